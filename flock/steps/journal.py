"""The journal of one step: the calls that it has finished.

A call is executed once. How it ended is on disk before the step continues: its result, what it has raised, or that the
program has cancelled it. So a step that runs again after a crash gets the same, in the same order; see
``flock.steps.replay``. If its run or step ends before that is on disk, or the process dies, a call has no entry and is
executed again.
"""

import asyncio
import contextlib
import functools
import hashlib
import inspect
import itertools
import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NoReturn, TypeVar, cast

import anyio
import anyio.lowlevel
import msgspec
from msgspec import UnsetType
from msgspec.structs import replace

from flock.agents.questions import (
    ASK,
    BATCH_REPLY,
    RECEIVE,
    SLEEP,
    TIMEOUT,
    TIMER,
    message_json,
    question_json,
    schema_of,
)
from flock.agents.signature import is_async, name_of
from flock.agents.tools import MAX_EXPIRES_S
from flock.errors import CallError, Uncertain, cut
from flock.pydanticmodel import to_json_and_back
from flock.runs import (
    JSON_NULL,
    Answer,
    Call,
    CallKind,
    Question,
    RunContext,
    Usage,
    bad_role,
    now,
    safe_text,
)
from flock.runs.context import CURRENT_CALL, CURRENT_LIMITS, CallKeep, CallOptions
from flock.runs.records import CALL_IDS
from flock.runs.traces import of_call
from flock.scopes import (
    Cancellation,
    Clock,
    Signal,
    clocks_stopped,
    current_task,
    move_on_after_working,
    note_late_cancellation,
)
from flock.steps.functions import (
    Signatures,
    arguments_of,
    check_name,
    checked_options,
    decoded,
    signature_of,
    with_context,
)
from flock.steps.identity import DIGEST_CHARS, asking_call, code_of, digest, digest_of, question_id
from flock.steps.outcomes import error_of
from flock.steps.raised import Refused, exception_of, is_refused, raised_by
from flock.steps.replay import NESTED, Entry, Replay, callers, numbered

logger = logging.getLogger("flock.runs")
_T = TypeVar("_T")

#: How many iterations of the event loop a step gets to start its next call before it is ended for a question.
CHECKPOINTS = 10
#: Shorter sleeps do not end the step, in seconds.
MIN_SUSPENDED_S = 5.0
#: How soon a call that waits in a shield notices that its run ends, in seconds.
CHECK_S = 0.5
#: The pause before a call is tried again, in seconds. It doubles with each try.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 8.0
#: How much of a call an error shows, in characters.
MAX_SHOWN = 400
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The JSON Schema of what a sleep returns.
NULL_TYPE = msgspec.Raw(b'{"type":"null"}')
_LATE = "The call {!r} was made after its step had ended. Await it in the step."


RunAgent = Callable[
    ["Journal", RunContext, str, Mapping[str, Any], CallKeep, Mapping[str, Any]], Coroutine[Any, Any, dict[str, Any]]
]


@dataclass(eq=False)
class Journal:
    """The calls of one execution of a step.

    Args:
        finished: the calls that earlier executions of the same step have finished, oldest first.
        save: stores a call; on return it is on disk.
        wait_for_store: is called before each call that is executed.
        on_start: is called with the id, name, kind, arguments and start time of each call that is executed.
        call_in_thread: calls a synchronous function in a worker thread.
        run_callee: see ``RunContext.run_agent``.
        spent: the tokens that earlier steps of the run have used.
        max_calls: how many more calls the run may make.
        max_result_bytes: max size of one result, as JSON.
        max_total_bytes: max size of all arguments and results together, as JSON.
        expose_errors: whether the text of any exception is stored with a failed call.
        clock: that of the run.
        now: see ``ActiveRun``.
        is_cut_off: whether the run is being stopped, or its deadline has passed. What then ends has no entry.
        replay_grace_s: how long a call that does not start again holds up the others, in seconds.
        stops_on_change: end the step before a call that replaces another one, because the program was changed.
        call_ids, call_key: see ``Run``.
        answer: answers the step's questions at once. Without it, the step ends if nothing but answers is missing.
        waited_for: the waits of the last execution that are not over. They keep their times, and questions what they
            ask.
        tries, position: that of the run, and that of the step.
        check_wait: is called with a question or an awaited message while the step runs. It returns the finished call if
            there is an answer. Otherwise the wait is then visible to clients.

    Attributes:
        kept: calls of this execution that are stored.
        spent: the tokens that the run has used so far.
        scope: the scope in which the step runs. It is cancelled to end the step.
        questions: the questions, sleeps and messages for which the step was ended.
        elsewhere: the agent for which it was ended, because only another process has it.
        change: how the program was changed, for which it was ended.
    """

    finished: InitVar[Iterable[Call]]
    _: KW_ONLY
    save: Callable[[Call], Awaitable[None]]
    wait_for_store: Callable[[], Awaitable[None]]
    on_start: Callable[[str, str, CallKind, msgspec.Raw, datetime], None] = lambda *call: None
    call_in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]
    run_callee: RunAgent
    spent: Usage
    max_calls: int
    max_result_bytes: float
    max_total_bytes: InitVar[float]
    expose_errors: bool
    clock: Clock
    now: Callable[[], datetime] = now
    is_cut_off: Callable[[], bool]
    replay_grace_s: InitVar[float]
    stops_on_change: bool = True
    call_ids: int = CALL_IDS
    call_key: str = ""
    answer: Answer | None = None
    waited_for: InitVar[Iterable[Question]] = ()
    tries: int = 1
    position: int = 0
    check_wait: Callable[[Question], Awaitable[Call | None]] | None = None

    def __post_init__(
        self,
        finished: Iterable[Call],
        max_total_bytes: float,
        replay_grace_s: float,
        waited_for: Iterable[Question],
    ) -> None:
        self.scope = anyio.CancelScope()
        self.questions: tuple[Question, ...] = ()
        self.elsewhere: str | None = None
        self.change: str | None = None
        #: questions, and names of agents that other processes have, by the id of the call that waits for them
        self._asked: dict[str, Question | str] = {}
        finished, waited_for = list(finished), list(waited_for)
        self._waited_for = {asking_call(each.call_id): each for each in waited_for}
        #: the answers that were given before, and the questions that were open, by what equal ones have in common
        self._asked_before: defaultdict[str, list[Call | Question]] = defaultdict(list)
        answers = [call for call in finished if call.kind == "question" and call.error is None]
        before: Iterable[Call | Question] = itertools.chain(answers, waited_for)
        for asked in before:
            self._asked_before[numbered(asking_call(asked.call_id))[0]].append(asked)
        #: the ids of questions, by that of the call that asks
        self._question_ids: dict[str, str] = {}
        #: how often an answer may have come; see ``note_answer``
        self._news = 0
        #: the calls that have begun and not ended, each with what cancels its task
        self._open: dict[str, Callable[[], object]] = {}
        #: a call has ended
        self._changed = Signal()
        checkpoints = [_as_asking(call) for call in finished if call.is_checkpoint]
        self._replay = Replay([call for call in checkpoints if not call.is_start], replay_grace_s)
        #: those that are executed at most once, by their id: their start, or their end if it is stored
        self._once: dict[str, Call] = {}
        for call in checkpoints:
            if call.once is not None and (call.call_id not in self._once or self._once[call.call_id].is_start):
                self._once[call.call_id] = call
        self._bytes_left = max_total_bytes - sum(map(_bytes_of, checkpoints))
        self.kept = self._made = 0
        self._failed: list[tuple[Call, BaseException | None]] = []
        self._last_start = max((call.started_at for call in checkpoints), default=EPOCH)
        #: equal calls, by what they have in common
        self._equal: defaultdict[str, _Equal] = defaultdict(_Equal)
        #: what the functions of calls execute, by the parent, the label and the key of the call
        self._codes: dict[tuple[str, str, str], object] = {}
        self._signatures = Signatures()
        self._is_closed = self._is_over = False
        self._save_error: BaseException | None = None
        #: the tokens used in each unfinished call, by its id; those of the step outside of calls are under ""
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)
        #: the model that answered last in each of these
        self._models: dict[str, str] = {}
        for call in self._replay.contained:
            if call.error is None:
                key, number = numbered(call.call_id)
                self._equal[key].taken.add(number)
        self.spent = sum((call.usage for call in self._replay.calls if call.usage is not None), self.spent)

    async def end(self, grace_s: float, are_in_threads: Callable[[], bool]) -> int:
        """Accept no more calls, cancel those that other tasks still await, and wait until they have ended.

        Args:
            grace_s: how long to wait for tasks that swallow their cancellation, in seconds.
            are_in_threads: whether synchronous functions are running, which are waited for without a limit.

        Returns: the number of calls that still run.
        Cancellation: ignored, unless the event loop is ending.
        """
        self._is_closed = True
        if self._open:
            for cancel in set(self._open.values()):
                cancel()
            give_up_at, waiting = anyio.current_time() + grace_s, anyio.CancelScope()
            with anyio.CancelScope(shield=True):
                while self._open and not waiting.cancelled_caught:
                    with anyio.CancelScope(deadline=math.inf if are_in_threads() else give_up_at) as waiting:
                        await self._changed.wait()
        self._is_over = True
        return len(self._open)

    @property
    def not_repeated(self) -> Sequence[str]:
        """The ids of finished calls that this execution has not repeated."""
        return [call.call_id for call in self._replay.not_repeated if NESTED not in call.call_id]

    @property
    def mixed_up(self) -> str | None:
        """See ``Replay``."""
        return self._replay.mixed_up

    @property
    def failed(self) -> Sequence[tuple[Call, BaseException | None]]:
        """The calls that have failed, each with the exception that this execution has seen, if it has seen one."""
        unseen = (*self._replay.not_repeated, *self._replay.contained)
        return [*self._failed, *((call, None) for call in unseen if call.error is not None)]

    def forget_failed(self) -> None:
        """Forget the exceptions that calls have raised: their tracebacks refer to this object."""
        self._failed.clear()

    def has_gone_on(self, call: Call) -> bool:
        """Whether a call of the step has started after *call* had failed."""
        if call.place is None:  # an answer
            return self._last_start > call.completed_at
        return self._replay.last_start > call.place.end

    @property
    def usage(self) -> Usage | None:
        """The tokens that the step has used, including those of its finished calls; None if it has used none."""
        used = self._usage[""]
        return used if used != Usage() else None

    @property
    def model(self) -> str | None:
        """The model that answered last in the step."""
        return self._models.get("")

    def spend(self, usage: Usage, model: str | None) -> None:
        """Add the tokens of an answer of *model* to the current call, or to the step."""
        self.spent += usage
        self._add_usage(CURRENT_CALL.get(), usage, model)

    def call(
        self,
        context: RunContext,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: CallOptions,
    ) -> Coroutine[Any, Any, Any]:
        """See ``RunContext.call``. Equal calls are numbered when they begin, in that order."""
        _check_in_loop(context)

        async def call() -> Any:  # it reads the arguments, so that to make thousands of calls does not hold the loop
            label = re.sub(r"[^A-Za-z0-9_.-]", "_", name_of(function))
            chosen, others = checked_options(label, function, kwargs, options)
            signature, hints = signature_of(label, function, self._signatures)
            positional, named = with_context(context, function, hints, args, others)
            arguments = arguments_of(label, signature, positional, named, chosen.name)
            call_key = "" if chosen.keep == "all" else self.call_key
            key = chosen.name or digest_of(label, function, arguments, hints, version=self.call_ids, key=call_key)
            self._check_code(label, key, function)
            execute = functools.partial(self._execute, function, positional, named)
            return await self.once(
                label,
                key,
                functools.partial(self._try, label, execute, chosen),
                arguments=arguments if chosen.keep == "all" else JSON_NULL,
                decode=functools.partial(decoded, label, hints.get("return", Any)),
                at_most_once=chosen.once,
            )

        return call()

    def _check_code(self, label: str, key: str, function: Callable[..., Any]) -> None:
        """Raise CallError if another function has a call with the same id. Earlier versions told modules apart."""
        if self.call_ids == 1:
            return
        code = code_of(function)
        known = self._codes.setdefault((CURRENT_CALL.get(), label, key), code)
        if known is not code and known != code:
            raise CallError(
                f"Two functions are called {label!r}, and their calls have the same id. Rename one of them, or "
                "pass another call_name= to each call."
            )

    def run_agent(
        self, context: RunContext, name: str, inputs: Mapping[str, Any], keep: CallKeep, options: Mapping[str, Any]
    ) -> Coroutine[Any, Any, dict[str, Any]]:
        """See ``RunContext.run_agent``."""
        _check_in_loop(context)
        return self.run_callee(self, context, name, inputs, keep, options)

    def ask(
        self,
        context: RunContext,
        question: str,
        type_: Any,
        name: str | None,
        expires_s: float | None,
        default: Any,
        about: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET,
        answerer: str | None = None,
        *,
        four_eyes: bool = False,
        kind: Literal["client_tool"] | UnsetType = msgspec.UNSET,
    ) -> Coroutine[Any, Any, Any]:
        """See ``RunContext.ask`` and ``Tool``. *about* is what the question is about, as a JSON object."""
        _check_in_loop(context)
        check_name(ASK, name)
        if answerer is not None and (problem := bad_role(answerer)):
            raise CallError(f"answerer={problem}")
        text = safe_text(question)
        rules: dict[str, Any] = {"answerer": msgspec.UNSET if answerer is None else answerer, "four_eyes": four_eyes}
        rules |= {"kind": kind} | ({"raises": True} if context.call_id else {})
        asked = self._asking(ASK, text, type_, expires_s, default, arguments=about, **rules)
        schema = asked(now()).schema
        key = name or hashlib.sha256(b"\0".join([text.encode(), schema])).hexdigest()[:DIGEST_CHARS]
        is_named = name is not None and isinstance(about, UnsetType)  # that of a tool's call is its place
        if is_named and not self._is_of_type(key, type_, schema):
            key = f"{key}.{digest(schema)}"
        return self._wait(ASK, key, asked, type_, "question", question_json(text, about), is_named=is_named)

    def _is_of_type(self, name: str, type_: Any, schema: msgspec.Raw) -> bool:
        """Whether a question that had this name before has such an answer, or none had it."""
        before = self._asked_before.get(_below(CURRENT_CALL.get(), f"{ASK}:{name}"), ())
        for each in before:
            if isinstance(each, Question):
                if each.schema == schema:
                    return True
                continue
            with contextlib.suppress(CallError):
                decoded(ASK, type_, each.result)
                return True
        return not before

    def receive(
        self, context: RunContext, name: str, type_: Any, expires_s: float | None, default: Any
    ) -> Coroutine[Any, Any, Any]:
        """See ``RunContext.receive``."""
        _check_in_loop(context)
        check_name(RECEIVE, name)
        asked = self._asking(RECEIVE, name, type_, expires_s, default, kind="message")
        return self._wait(RECEIVE, name, asked, type_, "message", message_json(name))

    @property
    def replies(self) -> Sequence[Call]:
        """The replies from batch endpoints."""
        return [call for call in self._replay.calls if BATCH_REPLY in call.call_id]

    def receive_reply(self, name: str, call: msgspec.Raw, type_: Any) -> Coroutine[Any, Any, Any]:
        """Wait for the reply to a *call* of a model through a batch endpoint: a message that the engine sends.

        No client can send it, since *name* is not a valid name for a message.
        """

        def asked(at: datetime) -> Question:
            more: dict[str, Any] = {"arguments": call, "asked_at": at, "kind": "message"}
            return Question(call_id="", question=name, schema=NULL_TYPE, **more)

        return self._wait(RECEIVE, BATCH_REPLY, asked, type_, "message", message_json(name))

    def sleep(self, context: RunContext, until: Callable[[datetime], datetime]) -> Coroutine[Any, Any, None]:
        """Sleep until the time that *until* returns from the beginning; see ``RunContext.sleep``.

        The time does not identify the call: the program may compute it from the clock whenever the step runs.
        """
        _check_in_loop(context)
        return self._wait(SLEEP, "timer", lambda at: _timer("", at, until(at)), None, "sleep", JSON_NULL)

    async def deadline(self, context: RunContext, seconds: float) -> datetime:
        """Return the time that is *seconds* after the first execution of this call.

        The seconds identify it, so that blocks of parallel tasks do not get the times of each other.
        """
        _check_in_loop(context)

        async def end() -> datetime:
            return now() + timedelta(seconds=seconds)

        arguments = msgspec.Raw(msgspec.json.encode({"seconds": seconds}))
        decode = functools.partial(decoded, TIMEOUT, datetime)
        key = str(float(seconds))
        time: datetime = await self.once(TIMEOUT, key, end, kind="sleep", arguments=arguments, decode=decode)
        return time

    def timer(self, until: datetime) -> Coroutine[Any, Any, None]:
        """Wait until a time, beside other calls: a step does not end for timers alone."""
        key = str(until.timestamp())
        return self._wait(TIMER, key, lambda at: _timer(TIMER, at, until), None, "sleep", JSON_NULL)

    def _asking(
        self, label: str, text: str, type_: Any, expires_s: float | None, default: Any, **more: Any
    ) -> Callable[[datetime], Question]:
        """Return a function that makes a question, or an awaited message, from the time at which it begins to wait.

        Raises: CallError if the *default* does not fit, or an option is invalid.
        """
        if expires_s is not None and not 0 < expires_s <= MAX_EXPIRES_S:
            raise CallError(f"expires_s must be above 0 and at most {MAX_EXPIRES_S} seconds, not {expires_s}.")
        schema = schema_of(type_)
        if default is not msgspec.UNSET:
            default = self._encode(label, default)
            decoded(label, type_, default)

        def asked(at: datetime) -> Question:
            expires_at = None if expires_s is None else at + timedelta(seconds=expires_s)
            fixed = {"question": text, "schema": schema, "default": default, **more}
            return Question(call_id="", asked_at=at, expires_at=expires_at, **fixed)

        return asked

    def _wait(
        self,
        label: str,
        key: str,
        asked: Callable[[datetime], Question],
        type_: Any,
        kind: CallKind,
        arguments: msgspec.Raw,
        *,
        is_named: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """Return a call that waits for an answer, a time or a message. *asked* makes it from its beginning."""
        if label != TIMER:
            self.check_may_wait(label)

        async def wait() -> Any:
            call_id = CURRENT_CALL.get()
            begun = self._begun(call_id, asked(now()))
            if begun.is_question:
                self._question_ids[call_id] = begun.call_id
                self.on_start(begun.call_id, label, kind, arguments, begun.asked_at)
            if kind == "sleep":
                assert begun.expires_at is not None
                left_s = (begun.expires_at - now()).total_seconds()
                # Other calls may work meanwhile, so its time counts.
                if left_s < MIN_SUSPENDED_S or (label == TIMER and self.answer is not None):
                    return await anyio.sleep(max(0, left_s))
            if self.answer is None or begun.is_model_call:
                return await self._suspend(call_id, begun)
            with clocks_stopped(self.clock):
                return await (anyio.sleep(left_s) if kind == "sleep" else self._execute(self.answer, (begun,), {}))

        decode = functools.partial(decoded, label, type_)
        return self.once(label, key, wait, kind=kind, arguments=arguments, decode=decode, is_named=is_named)

    def _begun(self, call_id: str, asked: Question) -> Question:
        """Return what a call waits for. If it has waited for it before, it is what it was then."""
        before = self._waited_for.pop(call_id, None)
        if not asked.is_question:
            asked = replace(asked, call_id=call_id)
        elif before is None:
            asked = replace(asked, call_id=question_id(call_id, self.tries, self.position, asked))
        else:
            asked = replace(asked, call_id=before.call_id, question=before.question, arguments=before.arguments)
        return asked if before is None else replace(asked, asked_at=before.asked_at, expires_at=before.expires_at)

    async def wait_elsewhere(self, agent_name: str) -> NoReturn:
        """End the step as a question does, because the step calls an agent that only another process has."""
        self.check_may_wait(f"call {agent_name!r}, which only another process has")
        key = f"{CURRENT_CALL.get()}{NESTED}{agent_name}"
        await self._suspend(f"{key}:{self._take_number(agent_name, key)}", agent_name)
        raise AssertionError("the step has ended")

    def check_may_wait(self, what: str) -> None:
        """Raise CallError in a call that is executed at most once: its step may end for *what*, and then run again."""
        current = CURRENT_CALL.get()
        for call_id in (current, *callers(current)):
            if call_id in self._open and call_id in self._once:
                raise CallError(
                    f"The call {self._once[call_id].name!r} is executed at most once (call_once, once=True), so it "
                    f"cannot {what}. Do that before the call, in the step."
                )

    @property
    def is_suspended(self) -> bool:
        """Whether the step was ended to start again later or elsewhere, or because the program was changed."""
        return bool(self.questions or self.elsewhere or self.change)

    def note_answer(self) -> None:
        """Check again whether there are answers, in the step that still runs."""
        self._news += 1
        self._changed.notify()

    async def _suspend(self, call_id: str, asked: Question | str) -> Any:
        """End the step when all calls that are open wait for answers, themselves or in the calls that they make.

        Return the default if it is due while the step still runs. Raises _Answered if the answer comes meanwhile.
        """
        self._asked[call_id] = asked
        wait, checked = asked if isinstance(asked, Question) else None, -1
        default = msgspec.UNSET if wait is None else wait.default
        due_at = None if wait is None or isinstance(default, UnsetType) else wait.expires_at
        try:
            with contextlib.nullcontext() if _is_timer(asked) else clocks_stopped():
                while True:
                    changed = self._changed.next
                    for _ in range(CHECKPOINTS):  # for a sibling that is between two calls
                        await anyio.lowlevel.checkpoint()
                    if wait is not None and self._should_check(wait, checked):
                        checked = self._news
                        await self._check(wait)
                        continue
                    is_last_asked = next(reversed(self._asked)) == call_id  # only one needs to check
                    if is_last_asked and self._waits_only and not self._is_closed:
                        if changed.is_set():  # a sibling has just left a call
                            continue
                        self.questions = tuple(each for each in self._asked.values() if isinstance(each, Question))
                        self.elsewhere = next((each for each in self._asked.values() if isinstance(each, str)), None)
                        self._close()
                    if self._is_closed:
                        await self._end_with_step()
                    with anyio.move_on_after(None if due_at is None else (due_at - now()).total_seconds()):
                        await self._changed.wait()
                    if due_at is not None and due_at <= now():
                        return msgspec.json.decode(cast(msgspec.Raw, default))
        finally:
            del self._asked[call_id]
            self._changed.notify()

    def _should_check(self, wait: Question, checked: int) -> bool:
        if wait.kind == "sleep" or wait.is_model_call or checked == self._news or self._is_closed:
            return False
        return wait.kind == "message" or not self._waits_only  # a message may be there, and it takes no second try

    async def _check(self, wait: Question) -> None:
        """Raise _Answered if there is an answer."""
        if self.check_wait is not None and (call := await self.check_wait(wait)) is not None:
            if self._replay.has_guesses:
                await self._replay.settle()
            raise _Answered(_as_asking(call))

    @property
    def _waits_only(self) -> bool:
        """Whether nothing but answers, times and messages is missing. Timers alone wait for code that makes no call."""
        if all(map(_is_timer, self._asked.values())):
            return False
        return self._open.keys() <= {*self._asked, *itertools.chain.from_iterable(map(callers, self._asked))}

    def once(
        self,
        label: str,
        key: str,
        execute: Callable[[], Awaitable[Any]],
        *,
        kind: CallKind = "function",
        arguments: msgspec.Raw,
        decode: Callable[[msgspec.Raw], Any],
        should_keep: Callable[[Any], bool] | None = None,
        on_error: Callable[[str], Any] | None = None,
        then: Callable[[Any], Awaitable[Any]] | None = None,
        at_most_once: bool = False,
        is_named: bool = False,
    ) -> Coroutine[Any, Any, Any]:
        """Return the result of a call from the journal, or execute it and store its result.

        Args:
            label: the name that people see.
            key: identifies the call, together with its label, among the calls of the same parent.
            arguments: are stored for people to see, as a JSON object, or null.
            decode: reads the result from JSON. It raises CallError.
            should_keep: whether a result must be stored before the step continues. A failure is then not stored.
            on_error: makes the result of a call of a tool that raised, from what clients may see of the error. Such a
                call has finished, so it is not executed again.
            then: is awaited with the result after the call. Its result is returned.
            at_most_once: see ``call_once`` of ``RunContext.call``.
            is_named: it is a question that the program has named, so it replaces no other one.
        """
        self._check_size(label, "arguments", arguments)
        parent = CURRENT_CALL.get()
        key = _below(parent, f"{label}:{key}")
        plan = functools.partial(
            _Planned,
            parent=parent,
            label=label,
            kind=kind,
            arguments=arguments,
            execute=execute,
            decode=decode,
            should_keep=should_keep,
            on_error=on_error,
            at_most_once=at_most_once,
            is_named=is_named,
        )

        async def run() -> Any:
            is_done, cancellation, equal = False, Cancellation(), self._equal[key]
            while equal.is_abandoned and not self._is_closed:  # it may still return, and this call gets its result
                await self._changed.wait()
            number = self._take_number(label, key)
            planned = plan(call_id=_with_number(key, number))
            equal.running[number] = cancellation
            try:
                # On asyncio a scope of anyio would cancel a task again and again until it leaves the block.
                task = cancellation.task
                with anyio.CancelScope() if task is None else contextlib.nullcontext(task) as running:
                    self._open[planned.call_id] = running.cancel
                    result = await self._result_of(planned, cancellation)
                    is_done = True
                    return result
                raise Refused(_LATE.format(label))  # only trio comes here
            finally:
                del self._open[planned.call_id], equal.running[number]
                self._changed.notify()
                # The next equal call takes its place, also when the step runs again. But the time of a sleep may have
                # come, which is then in the store.
                if not is_done and kind != "sleep":
                    equal.free(number)

        async def run_and_then(then: Callable[[Any], Awaitable[Any]]) -> Any:
            return await then(await run())  # a coroutine made before would be left over if its task never starts

        return run() if then is None else run_and_then(then)

    def _take_number(self, label: str, key: str) -> int:
        """Return the number of a call among the equal ones that run or have finished, from 1."""
        if self._save_error is not None:
            raise self._save_error
        if self._is_closed and not self.is_suspended:
            raise Refused(_LATE.format(label))
        if self._made >= self.max_calls:
            raise Refused("The run has made as many calls as one run may make (max_calls). Split its work into runs.")
        self._made += 1
        return self._equal[key].take()

    async def _result_of(self, planned: "_Planned", cancellation: Cancellation) -> Any:
        if self._is_closed:  # for a question, or because the program was changed
            await self._end_with_step()
        entry = self._replay.begin(planned.call_id, planned.arguments)
        if entry.stored is not None:
            return await self._repeated(planned, entry, entry.stored, cancellation)
        if planned.kind == "tool" and (
            late := self._replay.late_of_tool(planned.call_id, planned.label, planned.arguments)
        ):
            late = replace(late, call_id=planned.call_id, place=None)
            return self._end_of(planned, await self._store_end(late, entry, cancellation))
        if (once := self._once.get(planned.call_id)) is None:
            try:
                return await self._make(planned, entry, cancellation)
            except _Answered as answered:  # its place is stored too, since another answer may have been given before
                return self._end_of(planned, await self._store_end(answered.call, entry, cancellation))
        if once.is_start:
            return self._end_of(planned, await self._uncertain(planned, once, entry, cancellation))
        self._replay.forget(entry)
        return self._end_of(planned, once)

    async def _repeated(self, planned: "_Planned", entry: Entry, stored: Call, cancellation: Cancellation) -> Any:
        """Let a call end as in an earlier execution of the step."""
        self.kept += not entry.is_late
        self._add_usage(planned.parent, stored.usage, stored.model)
        if stored.error is not None:  # even if the step ends before it is delivered
            self._failed.append((stored, None))
        if not stored.is_cancelled:
            await self._deliver(stored, entry, cancellation)
            return self._end_of(planned, stored)
        timers = [_below(planned.parent, f"{TIMER}:{until.timestamp()}") for until in CURRENT_LIMITS.get()]
        try:
            await self._replay.until_cancelled(entry, timers)
        except anyio.get_cancelled_exc_class():
            with clocks_stopped():  # a limit that passes now would hide the cancellation
                if (late_s := self._replay.late_s(entry)) > 0:  # a plain time-out may have passed meanwhile
                    await self._in_step(anyio.sleep, late_s, cancellation)
                if not self._replay.is_cancelled_alone(entry):
                    await self._in_step(self._replay.until_it_may_see, entry.end, cancellation)
            raise
        finally:
            self._replay.cancelled_again(entry)
        is_sure = self._stops_before(planned) and self._replay.is_sure(entry.end)
        if is_sure and not self._replay.has_end(planned.call_id):
            await self._stop(f"it does not cancel the call {_shown(planned.label, planned.arguments)} again")
        if planned.at_most_once or self._replay.has_another(entry):
            return await self._result_of(planned, cancellation)
        if entry.failure is not None:
            return self._end_of(planned, entry.failure)
        if not (made := self._replay.reopen(entry)):
            return await self._result_of(planned, cancellation)
        for each in made:
            if each.stored is not None and each.stored.error is None:
                key, number = numbered(each.call_id)
                self._equal[key].free(number)
        return await self._make(planned, entry, cancellation)

    def _end_of(self, planned: "_Planned", stored: Call) -> Any:
        """Return what a stored call has returned, or raise what it has raised."""
        if stored.error is None:
            return planned.decode(stored.result)
        if planned.on_error is not None and stored.raised is None:
            self._failed.append((stored, None))
            return planned.on_error(stored.error)
        exc = exception_of(stored)
        self._failed.append((stored, exc))
        raise exc

    async def _start(self, planned: "_Planned", started_at: datetime, cancellation: Cancellation) -> None:
        """Store the start of a call that is executed at most once."""
        if self._is_closed:  # while the store was waited for
            await anyio.lowlevel.checkpoint()
            raise Refused(_LATE.format(planned.label))
        start = planned.call(
            error="Its end is not recorded.",
            error_type=Uncertain.error_type,
            once="started",
            started_at=started_at,
            completed_at=started_at,
        )
        await self._store(start, cancellation)
        self._once[planned.call_id] = start

    async def _uncertain(self, planned: "_Planned", start: Call, entry: Entry, cancellation: Cancellation) -> Call:
        """Store that the end of a call is unknown, so that an end that comes late does not count."""
        exc = Uncertain(
            f"The call {planned.label!r} was started at {start.started_at:%Y-%m-%d %H:%M:%S} UTC, and its end is not "
            "recorded. It is executed at most once, so find out whether it was done. A retry with "
            '{"calls": "again"} executes it again.'
        )
        ended = replace(
            start,
            arguments=planned.arguments,
            once="ended",
            error=str(exc),
            error_type=exc.error_type,
            raised=raised_by(planned.label, exc),
            completed_at=self.now(),
        )
        return await self._store_end(ended, entry, cancellation)

    async def _make(self, planned: "_Planned", entry: Entry, cancellation: Cancellation) -> Any:
        """Execute a call, and store how it ended."""
        started_at = await self._before_execution(planned, entry, cancellation)
        self._last_start = max(self._last_start, started_at)
        reset = CURRENT_CALL.set(planned.call_id)
        result, value, exc = JSON_NULL, None, None
        if planned.kind != "question":  # its id depends on what it asks
            self.on_start(planned.call_id, planned.label, planned.kind, planned.arguments, started_at)
        try:
            with of_call(planned.kind, planned.label, planned.call_id) as span:
                value = await planned.execute()
                if planned.kind == "tool":
                    of_tool = "gen_ai.tool.call"
                    span.content(lambda: {f"{of_tool}.arguments": planned.arguments, f"{of_tool}.result": value})
            # The block of a timer may have ended in time, perhaps in an earlier execution. And the end of a wait comes
            # after the answers that earlier ones have had, or their places in the program would change.
            if planned.label == TIMER or (planned.is_wait and self._replay.has_guesses):
                await self._replay.settle()
            if planned.should_keep is not None and not planned.should_keep(value):
                self._replay.forget(entry)
                return value
            result = self._encode(planned.label, value)
            self._check_room(planned.label, len(planned.arguments) + len(result), CallError)
            value = planned.decode(result)
        except _Answered:
            raise
        except BaseException as raised:
            result, exc = JSON_NULL, self._failure_of(planned.label, raised)
        finally:
            CURRENT_CALL.reset(reset)
            usage, model = self._usage.pop(planned.call_id, None), self._models.pop(planned.call_id, None)
            self._add_usage(planned.parent, usage, model)
        try:
            is_cancelled = cancellation.is_late or (exc is not None and cancellation.is_cause_of(exc))
            if exc is not None and self._has_no_end(planned, exc, is_cancelled=is_cancelled):
                self._replay.forget(entry)
                raise exc
            call = planned.call(
                result=result,
                usage=usage,
                model=model,
                once="ended" if planned.at_most_once else None,
                started_at=started_at,
                completed_at=self.now(),
            )
            if isinstance(exc, Exception):
                call = self._failed_call(planned, call, exc, is_cancelled=is_cancelled)
            if exc is not None and is_cancelled:
                await self._store_cancelled(call, entry, cancellation)
                self.kept += 1
                if not isinstance(exc, Exception):
                    raise exc
                await anyio.lowlevel.checkpoint_if_cancelled()  # a scope of anyio expects its own exception
                raise asyncio.CancelledError
            await self._store_end(call, entry, cancellation, exc)
            if exc is None:
                return value
            if planned.on_error is None or call.error is None or isinstance(exc, Uncertain):
                raise exc
            return planned.on_error(call.error)
        finally:
            exc = None  # its traceback refers to this frame

    async def _before_execution(self, planned: "_Planned", entry: Entry, cancellation: Cancellation) -> datetime:
        """Wait until a call may be executed. Return when it starts. If it is cancelled meanwhile, it never starts."""
        try:
            if self._stops_before(planned) and not (entry.is_known or planned.is_named):
                await self._check_change(planned)
            await self.wait_for_store()
            if self.is_cut_off():  # what cancels the step may not have reached this task
                for _ in range(CHECKPOINTS):
                    await anyio.lowlevel.checkpoint()
            started_at = self.now()
            if planned.at_most_once:
                await self._start(planned, started_at, cancellation)
                await cancellation.raise_if_late()
        except BaseException as exc:
            if cancellation.is_late or cancellation.is_cause_of(exc):
                call = planned.call(started_at=self.now(), completed_at=self.now())
                await self._store_cancelled(call, entry, cancellation)
            raise
        return started_at

    def _stops_before(self, planned: "_Planned") -> bool:
        """Whether a call that shows that the program was changed ends the step. What only takes time does not."""
        return self.stops_on_change and planned.kind != "sleep"

    async def _check_change(self, planned: "_Planned") -> None:
        """End the step if a call seems to replace another one, because the program was changed."""
        replaced = await self._replay.replaced_by(planned.call_id, planned.label)
        if replaced is not None:
            new, old = _shown(planned.label, planned.arguments), _shown(replaced.name, replaced.arguments)
            if new == old:  # they differ in what is not stored, or by their call_name=
                new, old = planned.call_id, replaced.call_id
            await self._stop(f"it makes the call {new} instead of {old}")

    def _has_no_end(self, planned: "_Planned", exc: BaseException, *, is_cancelled: bool) -> bool:
        """Whether a call that has raised *exc* is made again if the step runs again."""
        if not isinstance(exc, Exception):
            return not is_cancelled
        return planned.should_keep is not None or is_refused(exc) or (planned.at_most_once and self.is_cut_off())

    def _failed_call(self, planned: "_Planned", call: Call, exc: Exception, *, is_cancelled: bool) -> Call:
        """Return *call* with what is stored of *exc*."""
        error, error_type = error_of(exc, f"The call {planned.label!r}", expose_errors=self.expose_errors)
        is_raised = planned.on_error is None or isinstance(exc, Uncertain)
        is_final = is_raised and not is_cancelled and not self.is_cut_off()
        raised = raised_by(planned.label, exc) if is_final else None
        return replace(call, error=cut(error), error_type=error_type, raised=raised)

    async def _store_end(
        self, call: Call, entry: Entry, cancellation: Cancellation, exc: BaseException | None = None
    ) -> Call:
        """Store how a call has ended, and wait for its turn; see ``_deliver``. Returns it as it is stored."""
        place = self._replay.end(entry, late_s=cancellation.late_s if cancellation.is_late else None)
        if cancellation.is_requested and not cancellation.is_late:
            place = replace(place, ignored_cancellation=True)
        call = replace(call, place=place)
        if exc is not None:
            self._failed.append((call, exc))
        try:
            await self._store(call, cancellation)
        except BaseException:
            self._replay.forget(entry)
            raise
        self.kept += 1
        if call.once is not None:
            self._once[call.call_id] = call
        await self._deliver(call, entry, cancellation)
        return call

    async def _deliver(self, call: Call, entry: Entry, cancellation: Cancellation) -> None:
        """Wait for the turn of a call that has ended. If it is cancelled before, the next equal one gets its result."""
        try:
            await cancellation.raise_if_late()  # of while it was saved, or its thread was running
            has_waited = call.kind in ("question", "message") or call.place is None  # so its time has not counted
            turn = functools.partial(self._replay.turn, is_last=len(self._open) == 1, has_waited=has_waited)
            if call.place is None or not call.place.ignored_cancellation:
                await turn(entry)
                return
            await self._in_step(turn, entry, cancellation)
            if self._is_closed or self.is_cut_off():
                await self._end_with_step()
        except anyio.get_cancelled_exc_class():
            self._replay.forget(entry)
            call = replace(call, usage=None, model=None)  # they are stored with the result
            if call.error is None and call.kind != "sleep":  # the time of the next one has just begun
                self._replay.keep_late(call)
            await self._store_cancelled(call, entry, cancellation, is_stored=True)
            raise

    async def _store_cancelled(
        self, call: Call, entry: Entry, cancellation: Cancellation, *, is_stored: bool = False
    ) -> None:
        """Store that the program has cancelled a call. If the run or the step is ending, nothing is stored.

        A timer ends after all that is stored, and so after a block that has ended in time, unless its end *is_stored*.
        """
        if self._is_closed or self.is_cut_off() or (call.name == TIMER and not is_stored):
            return
        call = replace(
            call,
            result=JSON_NULL,
            error=call.error or f"The program has cancelled the call {call.name!r}.",
            error_type=call.error_type or "cancelled",
            raised=None,
            once=None,
            place=(place := self._replay.end(entry, is_cancelled=True, late_s=cancellation.late_s)),
            completed_at=self.now(),
        )
        self._failed.append((call, None))
        try:
            with clocks_stopped():  # a limit that passes now would hide the cancellation
                with contextlib.suppress(Exception):  # the next call raises it
                    await self._store(call, cancellation)
                if len(self._open) > 1 or not self._replay.is_alone(place.end):  # so that tasks see it alone
                    await self._in_step(self._replay.until_it_may_see, place.end, cancellation)
        finally:
            self._replay.saw(entry, place.end)

    async def _stop(self, change: str) -> NoReturn:
        """End the step, because the program was changed."""
        self.change = change
        self._close()
        await self._end_with_step()

    def _close(self) -> None:
        """End the step, and let it start again later or elsewhere, or not at all."""
        self._is_closed = True
        self.scope.cancel()
        self._changed.notify()

    async def _end_with_step(self) -> NoReturn:
        """End a call with its step. In a shield of anyio, nothing else would end it."""
        for _ in range(CHECKPOINTS):  # tasks that are cancelled now come first
            await anyio.lowlevel.checkpoint()
        if current_task() is not None:
            raise asyncio.CancelledError
        raise Refused("The step has ended. Do not ask, sleep or receive in a shield.")

    def _failure_of(self, label: str, exc: BaseException) -> BaseException:
        """Return *exc*, or a CallError for an exit. asyncio ends its loop if an exit leaves a task, as in a gather."""
        if not isinstance(exc, (SystemExit, KeyboardInterrupt)):
            return exc
        failure = CallError(error_of(exc, f"The call {label!r}", expose_errors=self.expose_errors)[0])
        failure.__cause__ = exc
        return failure

    def _add_usage(self, parent: str, usage: Usage | None, model: str | None) -> None:
        if usage is not None:
            self._usage[parent] += usage
        if model is not None:
            self._models[parent] = model

    async def _try(self, label: str, execute: Callable[[], Awaitable[Any]], options: CallOptions) -> Any:
        """Execute a call, again if it raises, and each time with its time limit."""
        pause_s, cancellation = FIRST_PAUSE_S, Cancellation()
        for tries_left in range(options.retries, -1, -1):
            try:
                if options.timeout_s is None:
                    return await execute()
                with move_on_after_working(options.timeout_s):
                    return await execute()
                raise TimeoutError(f"The call {label!r} did not end within {options.timeout_s:g} s (call_timeout_s).")
            except Exception as exc:
                # A function may turn its cancellation into an exception, and asyncio cancels a task only once.
                is_cancelled = cancellation.is_late or cancellation.is_cause_of(exc)
                if not tries_left or is_cancelled or is_refused(exc) or self.is_cut_off():
                    raise
            await anyio.sleep(pause_s * (1 - 0.25 * random.random()))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def _execute(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if is_async(function):
            return await function(*args, **kwargs)
        value = await self.call_in_thread(functools.partial(function, *args, **kwargs))
        return await value if inspect.isawaitable(value) else value

    def _encode(self, label: str, value: Any) -> msgspec.Raw:
        try:
            result = msgspec.json.encode(value, enc_hook=to_json_and_back)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise CallError(f"The result of the call {label!r} cannot be converted to JSON: {exc}.") from exc
        self._check_size(label, "result", result)
        return msgspec.Raw(result)

    def _check_size(self, label: str, part: str, content: bytes | msgspec.Raw) -> None:
        if len(content) > self.max_result_bytes:
            raise CallError(
                f"The {part} of the call {label!r} has {len(content)} bytes, more than the maximum "
                f"({self.max_result_bytes}, max_result_bytes). Use a reference to long values instead."
            )

    def _check_room(self, label: str, size: int, error: type[CallError]) -> None:
        """Raise *error* if there is no room for *size* bytes of a call. A failed one has no result, and may fit."""
        if size > self._bytes_left:
            raise error(
                f"The arguments and results of the step's calls are larger than the cluster can store. The call "
                f"{label!r} has {size} bytes of them. Return references to long results instead."
            )

    async def _store(self, call: Call, cancellation: Cancellation) -> None:
        if call.kind == "question":
            call = replace(call, call_id=self._question_ids.get(call.call_id, call.call_id))
        self._check_room(call.name, size := _bytes_of(call), Refused)
        self._bytes_left -= size
        if self._is_over or self.is_suspended:  # a function may swallow the end of its step, and return anything
            return
        try:
            # It is done, so it must not be executed again, even if this task is cancelled meanwhile.
            await self._finish(self.save(call), cancellation)
        except Uncertain:  # another process has started it too
            raise
        except Exception as exc:
            self._save_error = exc
            raise

    async def _in_step(self, work: Callable[[_T], Awaitable[None]], what: _T, cancellation: Cancellation) -> None:
        """Await *work* on *what* in spite of cancellations of this task, until the run or the step is ending."""
        if cancellation.task is current_task():  # otherwise the task is not executed any more, but destroyed
            await self._finish(work(what), cancellation, lambda: self._is_closed or self.is_cut_off())

    async def _finish(
        self,
        work: Awaitable[None],
        cancellation: Cancellation,
        is_over: Callable[[], bool] | None = None,
    ) -> None:
        """Await *work* in spite of cancellations of this task, until *is_over*, which is checked again and again."""
        with anyio.CancelScope(shield=True):
            if cancellation.task is None:  # trio
                await work
                return
            # In a task of its own, since asyncio.timeout cancels this one in spite of the shield.
            working, cancelled_at = asyncio.ensure_future(work), None
            while not (working.done() or (is_over is not None and is_over())):
                try:
                    await asyncio.wait([working], timeout=None if is_over is None else CHECK_S)
                except asyncio.CancelledError:
                    cancelled_at = note_late_cancellation(cancelled_at)
            if not working.cancel():
                working.result()


def _as_asking(call: Call) -> Call:
    """Return an answer as the end of the call that has asked."""
    return replace(call, call_id=asking_call(call.call_id)) if call.kind == "question" else call


def _timer(name: str, at: datetime, until: datetime) -> Question:
    return Question(
        call_id="", question=name, schema=NULL_TYPE, asked_at=at, expires_at=until, default=JSON_NULL, kind="sleep"
    )


def _is_timer(asked: Question | str) -> bool:
    return isinstance(asked, Question) and asked.kind == "sleep" and asked.question == TIMER


class _Answered(BaseException):
    """The answer of a wait has come, and is stored as *call*. An Exception could be one of the call."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.call_id)
        self.call = call


class _Equal:
    """Calls that differ only in their number.

    Attributes:
        taken: the numbers of those that run or have returned.
        running: those that run, by number.
    """

    __slots__ = ("_lowest", "running", "taken")

    def __init__(self) -> None:
        self._lowest = 1
        self.taken: set[int] = set()
        self.running: dict[int, Cancellation] = {}

    @property
    def is_abandoned(self) -> bool:
        """Whether one of them runs although the program has cancelled it, such as a function in a thread."""
        return any(cancellation.is_requested for cancellation in self.running.values())

    def take(self) -> int:
        """Return the smallest number that is free."""
        while self._lowest in self.taken:
            self._lowest += 1
        self.taken.add(self._lowest)
        return self._lowest

    def free(self, number: int) -> None:
        self.taken.discard(number)
        self._lowest = min(number, self._lowest)


class _Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A call that is not executed yet. ``parent`` is the id of the call that makes it, or ""."""

    call_id: str
    parent: str
    label: str
    kind: CallKind
    arguments: msgspec.Raw
    execute: Callable[[], Awaitable[Any]]
    decode: Callable[[msgspec.Raw], Any]
    should_keep: Callable[[Any], bool] | None
    on_error: Callable[[str], Any] | None
    at_most_once: bool
    is_named: bool

    @property
    def is_wait(self) -> bool:
        return self.kind in ("sleep", "question", "message") and self.label != TIMEOUT

    def call(self, **fields: Any) -> Call:
        return Call(call_id=self.call_id, name=self.label, kind=self.kind, arguments=self.arguments, **fields)


def depth_of_current_call() -> int:
    """Return how many calls contain the current code: 0 outside of calls."""
    call_id = CURRENT_CALL.get()
    return call_id.count(NESTED) + 1 if call_id else 0


def _shown(name: str, arguments: msgspec.Raw) -> str:
    """Return a call as people know it: its name, and as much of its arguments as is stored and short."""
    text = name if bytes(arguments) in (b"null", b"{}") else f"{name} {bytes(arguments).decode()}"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _below(parent: str, key: str) -> str:
    """Return the key of a call that the call *parent* makes; "" is the step."""
    return f"{parent}{NESTED}{key}" if parent else key


def _with_number(key: str, number: int) -> str:
    """Return the id of a call; see ``numbered``."""
    return key if number == 1 else f"{key}:{number}"


def _check_in_loop(context: RunContext) -> None:
    """Raise CallError in a worker thread, where calls cannot be awaited."""
    try:
        anyio.lowlevel.current_token()
    except RuntimeError as exc:
        call_id = CURRENT_CALL.get()
        subject = f"The function of the call {call_id!r}" if call_id else repr(context.agent_name)
        raise CallError(f"{subject} is not async, so it cannot make calls. Make it async.") from exc


def _bytes_of(call: Call) -> int:
    return len(call.arguments) + len(call.result)

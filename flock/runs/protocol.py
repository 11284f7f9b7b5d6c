"""The protocol of engines: their methods, their limits, and the events that observers receive."""

from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol, Self

import msgspec

from flock.errors import EngineFull
from flock.files import FileReference
from flock.runs.client import ClientSettings
from flock.runs.events import Event
from flock.runs.records import (
    AskedQuestion,
    Batch,
    BatchFilter,
    BatchOptions,
    Call,
    IdempotencyKey,
    Inputs,
    ItemLimits,
    Items,
    LongJSON,
    OnInvalid,
    Page,
    Principal,
    QuestionFilter,
    QuestionPage,
    RetriedCalls,
    Run,
    RunFilter,
    RunStatus,
    Session,
    Statuses,
    Step,
)
from flock.runs.usage import Account, Usage, UsageFilter, UsagePage

__all__ = ["Engine", "EngineHealth", "FileBox", "Observer", "Queue", "QueueLimits"]


class Queue(msgspec.Struct, frozen=True):
    """The number of runs that wait for their first step, and when the oldest one that never started was accepted.

    ``asking`` is the number of runs that wait for answers of people or clients. They do not count for any limit.
    ``by_agent`` has the queued runs of each agent. ``questions`` are the open ones, and ``webhooks`` those that wait to
    be sent. Counting stops at 100,000. What an engine does not know is None.
    """

    depth: int
    oldest_at: datetime | None
    asking: int = 0
    by_agent: Mapping[str, int] | None = None
    questions: int | None = None
    oldest_question_at: datetime | None = None
    webhooks: int | None = None
    oldest_webhook_at: datetime | None = None


class QueueLimits(msgspec.Struct, frozen=True):
    """Max queued runs: of all principals together, and of one principal."""

    max_runs: int
    max_runs_per_principal: int

    @classmethod
    def of(cls, max_queue: int, max_queue_per_principal: int | None) -> "QueueLimits":
        """Return the limits for these options of an engine. By default one principal may use half of the queue."""
        return cls(max_queue, max(1, max_queue // 2) if max_queue_per_principal is None else max_queue_per_principal)

    def check(self, count: int, state: str = "queued") -> None:
        """Raise EngineFull if *count* runs fill the queue."""
        if count >= self.max_runs:
            raise EngineFull(
                f"{count} runs are already {state}, the limit of this server (max_queue). Try again later."
            )

    def check_share(self, count: int, state: str = "queued") -> None:
        """Raise EngineFull if *count* runs of one principal fill its share of the queue."""
        if count >= self.max_runs_per_principal:
            raise EngineFull(
                f"{count} runs of this caller are already {state}, the limit for one caller "
                "(max_queue_per_principal). Try again later."
            )


class EngineHealth(msgspec.Struct, frozen=True):
    """The health of an engine. It accepts new work if it is running and its store is ok."""

    engine: Literal["running", "stopping", "stopped"] = "running"
    store: Literal["ok", "failing"] = "ok"


class Observer:
    """Receives events of an engine. Its methods are called in the event loop, so they must be fast.

    Subclass it, and define the methods that you need. An exception that one raises is logged.

    An engine reports what it executes itself, not what other processes on its store do. On a cluster, workers report
    runs (``TemporalWorker(observers=[…])``), without the end of runs that are not items, and without batches.
    """

    def run_started(self, run: Run) -> None:
        """An attempt of a run has started."""

    def step_completed(self, step: Step) -> None:
        """An agent has completed a step."""

    def call_completed(self, call: Call) -> None:
        """A call of a step has completed or failed."""

    def tokens_spent(self, agent_name: str, usage: Usage) -> None:
        """A model has answered an agent; the answer may still be invalid."""

    def run_waiting(self, run: Run) -> None:
        """A run, or an item, has begun to wait for answers, a time or messages; see ``run.waiting_for``."""

    def run_ended(self, run: Run) -> None:
        """A run has reached a final status. If it ended while it was waiting, it may be a stub without inputs."""

    def batch_accepted(self, batch: Batch) -> None:
        """A batch was accepted, or a retry of it: then ``batch.attempt`` is 2 or more. No item of it has started."""

    def batch_ended(self, batch: Batch) -> None:
        """A batch has reached a final status."""

    def model_call_retried(self) -> None:
        """A model call failed and will be retried."""


class FileBox(Protocol):
    """The files of one principal. The same content of another one is not visible in it."""

    async def keep(self, data: AsyncIterable[bytes], name: str = "", declared: str = "", at: str = "") -> FileReference:
        """Store a content. On return it is on disk, and is kept for a day, and then as long as a run has it.

        Args:
            declared: its media type, as far as the client says.
            at: where it is in the request, for errors.

        Raises: InvalidData if the content is of another type; TooLarge; StoreError.
        Cancellation: nothing is stored.
        """

    async def keep_all(self, contents: Mapping[str, bytes | None]) -> tuple[str, ...]:
        """Store the files of ``Signature.take``, and return ``Run.files``. Raises TooLarge, StoreError."""

    def find(self, file_id: str) -> FileReference:
        """Return a stored file, which is then kept for another day. Raises NotFound."""

    def path(self, file_id: str) -> Path:
        """Return the path of a stored content."""


class Engine(Protocol):
    """Accepts and executes runs and batches. The embedded engine and the Temporal engine both implement it.

    Use it as an async context manager. Outside of the context, all methods except ``health``, ``observe``, ``watch``
    and ``shown_result`` raise EngineStopped.
    """

    @property
    def item_limits(self) -> ItemLimits:
        """The limits on the number of items in a batch and on the size of each."""

    @property
    def calls_models(self) -> bool:
        """Whether it calls the models itself, and needs their keys and packages. On a cluster, workers do."""

    @property
    def is_draining(self) -> bool:
        """Whether the engine rejects new work because the server is shutting down."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting work, wait up to *timeout_s* seconds for running work to end, then stop the rest.

        Asynchronous runs that are stopped are resumed at the next start. Other runs fail as "interrupted". The event
        streams of runs that may still end continue; others end at once.
        """

    async def check_ready(self) -> None:
        """Raise EngineStopped or StoreError if new runs cannot be accepted now."""

    def health(self) -> EngineHealth:
        """Return the state of the engine and its store."""

    def observe(self, observer: Observer) -> None:
        """Notify *observer* of all events from now on. No effect on a cluster, where workers have observers."""

    async def queue(self) -> Queue:
        """Return the state of the queue, over all processes that share it. Raises StoreError."""

    def files(self, principal: str | None = None) -> FileBox:
        """Return the files of a principal. Raises Conflict if the engine keeps none."""

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
        """Accept a run and return without waiting for its result.

        Args:
            inputs: one value for each field of the agent's input signature: a mapping, or the text of a JSON object.
            request_id: id of the caller's request in the log.
            traceparent: trace context of the caller's request (W3C Trace Context), passed on to model calls. An invalid
                one is ignored.
            principal: the run's owner, or only its name.
            is_async: True for a run that does not need a waiting caller. It is on disk when this method returns, and is
                resumed after a crash. It starts in an empty context. Otherwise it is written as it runs, fails as
                interrupted if the process dies, and sees the caller's context variables if it runs in this process.
                With a *key*, it is stored and resumed like an asynchronous one in any case.
            timeout_s: wall-clock seconds for each attempt, capped at the engine's limit.
            session_id: the session of *principal* that the run joins, 1 to 128 visible ASCII characters. The run starts
                when the runs of the session that were accepted before it have ended. A retry joins again as the last.
            continues: the newest run of the session that the caller knows, or "". The run is refused if there is a
                newer one. None accepts it in any case.
            replaces: the run takes the place of *continues*, which is cancelled, or deleted if it has ended, in the
                transaction that accepts the run. On a cluster, the run cancels it if this process dies before, and
                does not delete it. No effect if the run is refused.
            max_cost: US dollars that its model calls may cost in all attempts, 0 < max_cost <= ``MAX_COST``. It is
                checked before each call but the first, which always runs.
            key: detects repeated requests.
            run_id: a ``new_id()`` that no other run has; None creates one.
            watch: keep what its agents write, from the start, for the first reader of its ``events``: at most 10 s
                after the run has ended or begun to wait for an answer, and less if many such runs have no reader.
                Otherwise only the text of asynchronous runs is kept, while they are active.
            client: what the client brings. Instructions are dropped unless an agent takes them; see ``ModelAgent``.

        Returns:
            Run: status "starting".

        Raises:
            AgentNotFound: there is no agent with that name.
            InvalidData: the inputs are invalid; pointers begin with ``/inputs``. Or there is a ``max_cost``, and the
                agent, or one that can follow it, has a model without a price. Or *client* is invalid, or has tools or
                options that no agent of the run takes, or a tool with the name of one of the agent; see
                ``flock.agents.clients``.
            Replayed: a run was already created with this key.
            KeyReused: the key was already used for a different request.
            KeyInUse: another request with this key is being accepted at the same time.
            Conflict: the session has a run after *continues*.
            EngineFull: the queue is full.
            EngineStopped: the engine is not running, or is shutting down.
            StoreError: the run cannot be stored.

        Cancellation: the run is either accepted completely or not at all.
        """

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
        """Read and validate all items, then accept the batch. If an item is rejected, no item starts.

        Args:
            items: read one at a time. They are staged, and not visible until the last one is read.
            on_invalid: "skip" accepts invalid items and fails them as "invalid_input".

        Raises:
            InvalidData: items are invalid (up to 100 errors), or there are no items. A pointer begins with
                ``/batch_inputs/{position}`` if the item has no location of its own.
            TooLarge: there are more than ``max_items``.
            DefinitionError: an option is invalid.
            The errors of ``submit``, and any exception that *items* raises.

        Cancellation: the batch is either accepted completely or not at all.
        """

    async def made_by(self, key: IdempotencyKey) -> str | None:
        """Return the id of the run or batch that was accepted with *key*, or None. Raises StoreError."""

    async def secret(self) -> str:
        """Return the key of this flock, which its processes share and no client sees. Raises StoreError."""

    async def get_run(self, run_id: str, principal: str | None = None) -> Run:
        """Return the current state of a run of *principal*; None means of any. Raises RunNotFound."""

    async def get_outline(self, run_id: str, principal: str | None = None) -> Run:
        """Like ``get_run``, but it may be a stub: its inputs and long results are not read; see ``Run.is_stub``."""

    async def get_state(self, run_id: str, principal: str | None = None) -> tuple[RunStatus, int]:
        """Return the status and the attempt of a run of *principal*, for which no result is read. Raises RunNotFound.

        A run that has not started may be reported as running.
        """

    async def get_calls(self, run: Run) -> Mapping[int, Sequence[Call]]:
        """Return the calls of *run* that have ended, by the position of their step, oldest first.

        If the run does not run now, they include calls that may be executed only once and whose end is not recorded.
        Of long arguments and results only ``NOT_LOADED`` is returned, and at most ``MAX_SHOWN_CALLS`` calls of a run,
        answers before others. They are those of all attempts.
        """

    async def shown_result(self, run: Run, position: int | None = None) -> msgspec.Raw | LongJSON | None:
        """Return the result of *run*, or of its step at *position*. A long one may be a ``LongJSON``.

        Raises: RunNotFound, StoreError if *run* is a stub, whose results are only in the store.
        """

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        """Wait until the run is final or asks a question, at most *timeout_s* seconds, and return it.

        One that waits for a time or a message is waited for.

        Raises: RunNotFound; StoreError if its final status cannot be written now; EngineStopped if the engine stops and
            leaves the run to be resumed later.
        Cancellation: the run continues.
        """

    async def cancel_run(self, run_id: str) -> Run:
        """Request cancellation of a run and return without waiting. A run that is already cancelled is returned as is.

        Returns: the run, which may be a stub, as that of ``get_outline``.

        Raises: RunNotFound; Conflict if it is completed or failed.
        """

    async def answer_call(self, run_id: str, call_id: str, output: msgspec.Raw, by: Principal | None = None) -> Run:
        """Answer a question of a run. If the run is waiting, it continues.

        Args:
            by: the principal who answers; None is the program itself, which may answer any question.

        Returns: the run, which may be a stub, as that of ``get_outline``. The same answer may be given again.

        Raises:
            RunNotFound; CallNotFound if the run does not ask this, and has not asked it before.
            Forbidden: *by* lacks the role that the question names, or has started or retried the run.
            InvalidData: the answer does not match the question's schema; pointers begin with ``/output``.
            StaleAnswer: the question was answered otherwise, or is no longer open. It has the questions that are.
            Conflict: this program does not have the agent.
            EngineStopped, StoreError.
        """

    async def get_question(self, run_id: str, call_id: str, by: Principal | None = None) -> AskedQuestion:
        """Return a question that a run has asked, open or not. *by*: see ``answer_call``.

        Raises: RunNotFound if *by* may not know of it; CallNotFound, StoreError.
        """

    async def send_message(
        self, run_id: str, name: str, message: msgspec.Raw, key: IdempotencyKey | None = None
    ) -> Run:
        """Send a message to a run; see ``RunContext.receive``. If the run waits for it, the run continues.

        On return the message is on disk, or in the cluster. It is kept until the run receives it.

        Args:
            name: of the message.
            key: detects repeated requests.

        Returns: the run, which may be a stub, as that of ``get_outline``.

        Raises:
            RunNotFound.
            InvalidData: the name is invalid, or the message does not match the type for which the run waits; pointers
                begin with ``/message``.
            TooLarge: it is longer than ``max_input_bytes``.
            TooManyRequests: too many messages are kept for this run.
            Replayed: the same message was sent with this key before.
            KeyReused: the key was already used for something else.
            Conflict: the run has ended; or this program does not have its agent.
            EngineStopped, StoreError.
        """

    async def list_questions(self, wanted: QuestionFilter, wait_s: float = 0) -> QuestionPage:
        """Return one page of open questions, the newest run first. If there are none, wait for one up to *wait_s*."""

    def question_events(self, wanted: QuestionFilter) -> AsyncGenerator[tuple[str, AskedQuestion] | None, None]:
        """Yield the open questions, then each that is asked, and each that is no longer open, until the engine drains.

        With each comes the name of the event, "question.asked" or "question.closed"; and None after 15 s without one.
        """

    async def retry_run(
        self, run_id: str, max_cost: float | None = None, *, calls: RetriedCalls = "keep", by: Principal | None = None
    ) -> Run:
        """Start the next attempt of a failed or cancelled run after its last committed step.

        Retrying an item starts the next attempt of its batch, which must have ended too.

        Args:
            max_cost: replaces that of the run, or of the batch of an item. Earlier attempts count too.
            calls: "keep" keeps what the calls of the failed step have returned, the answers of people, the idempotency
                keys, and failures after which the step has made other calls. It executes again what the step has
                failed with. "again" executes all calls again, with new keys.
            by: the principal who retries it, and cannot answer its ``four_eyes`` questions. None is the program itself.

        Raises: RunNotFound, Conflict, EngineFull, EngineStopped.
        """

    async def delete_run(self, run_id: str) -> None:
        """Delete a final run. Raises RunNotFound; Conflict if it is active or is an item of a batch."""

    async def get_session(self, session_id: str, principal: str | None = None) -> Session:
        """Count the runs of a session of *principal*, and what they have spent; None means of all principals.

        Every run is read. Raises: SessionNotFound if there are none.
        """

    async def delete_session(self, session_id: str, principal: str | None = None) -> None:
        """Delete all runs of a session of *principal*; None means of all principals.

        Raises: SessionNotFound if there are none; Conflict, before anything is deleted, if one of them is active.
        """

    async def check_budget(
        self,
        principal: str,
        max_cost: float | msgspec.UnsetType | None = msgspec.UNSET,
        key: IdempotencyKey | None = None,
    ) -> None:
        """Check that a principal may start runs today, and set what they may cost.

        Args:
            max_cost: US dollars that its runs and batches may cost in a day, in UTC, also those that run already; None
                means no limit. By default it stays as it is.
            key: that of the request. If one was accepted with it before, there is no check.

        Raises: TooManyRequests if that is spent; EngineStopped, StoreError.
        """

    async def get_account(self, principal: str) -> Account:
        """Return what the runs of a principal may cost in a day, and have cost today. Raises StoreError."""

    async def get_usage(self, wanted: UsageFilter) -> UsagePage:
        """Return one page of what was spent, newest days first. It is kept when runs are deleted. Raises StoreError."""

    async def list_runs(self, wanted: RunFilter) -> Page[Run]:
        """Return one page of runs, newest first, without batch items and steps. Long runs make a page shorter."""

    def watch(self, run_id: str) -> AbstractContextManager[object]:
        """Keep the live output of a run inside the block, so that a reader of its events gets it from the start.

        The run need not exist yet: its id can be passed to ``submit``. If the events are read once, ``submit`` with
        ``watch=True`` is shorter.
        """

    def events(self, run_id: str, after: int = 0, *, reasoning: bool = False) -> AsyncGenerator[Event | None, None]:
        """Yield the events of a run after the id *after* until it ends, and None after 15 s without an event.

        Events of the live output, such as ``output.delta``, have no id. They are sent after the ``step.started`` and
        before the ``step.completed`` of their step.

        Args:
            reasoning: also yield ``reasoning.delta``.

        Raises RunNotFound before the first event. A slow reader may miss progress events, but no others.
        """

    async def get_batch(self, batch_id: str) -> Batch:
        """Return the current state of the batch. Raises BatchNotFound."""

    async def wait_batch(self, batch_id: str, timeout_s: float | None = None) -> Batch:
        """Wait for a batch, like ``wait``."""

    async def get_items(
        self, batch_id: str, *, after: int = -1, limit: int = 1000, statuses: Statuses = tuple(RunStatus)
    ) -> Sequence[Run]:
        """Return up to *limit* items after the position *after*, in order, without their steps.

        There may be fewer if they are long. An empty page means that there are no more items. Raises BatchNotFound.
        """

    async def list_batches(self, wanted: BatchFilter) -> Page[Batch]:
        """Return one page of batches, newest first. Long errors make a page shorter."""

    def batch_events(self, batch_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        """Yield the progress of a batch, at most 4 times a second, and its end. Yield None after 15 s without an event.

        Raises BatchNotFound before the first event. The id of the final event is the batch's attempt. Progress events
        have no id.
        """

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Cancel a batch, like ``cancel_run``: no more items start, and running items are cancelled."""

    async def retry_batch(
        self,
        batch_id: str,
        only: Statuses = (),
        max_cost: float | None = None,
        *,
        calls: RetriedCalls = "keep",
        by: Principal | None = None,
    ) -> Batch:
        """Start the next attempt of the failed and cancelled items of a final batch.

        Args:
            only: retry only items with these statuses.
            max_cost: replaces that of the batch. Earlier attempts count too.
            calls, by: see ``retry_run``.

        Raises: DefinitionError if a status is unknown; BatchNotFound; Conflict if it is not final, or has no such item;
            InvalidData if it has spent its ``max_cost``, and *max_cost* is not higher; EngineFull, EngineStopped.
        """

    async def delete_batch(self, batch_id: str) -> None:
        """Delete a final batch and its items. Raises BatchNotFound; Conflict if it is active."""

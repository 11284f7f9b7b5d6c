"""The port of the store: all that an engine asks of a store. It knows nothing else of it.

A method that may wait for the disk, or for other processes, is async. If a call is cancelled, what it writes is written
anyway. *then* is called after the commit, even in that case.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import msgspec

from flock.agents.program import Program
from flock.errors import EngineFull, StoreError
from flock.models.completions import Completion
from flock.runs import (
    Account,
    AskedQuestion,
    Batch,
    BatchFilter,
    BatchOptions,
    Call,
    IdempotencyKey,
    Page,
    Principal,
    Question,
    QuestionFilter,
    QuestionPage,
    Queue,
    QueueLimits,
    RetriedCalls,
    Run,
    RunFilter,
    RunStatus,
    Spent,
    Step,
    Usage,
    UsageFilter,
    UsageRow,
)
from flock.runs.records import Raised
from flock.steps.identity import Newest
from flock.steps.outcomes import Outcome
from flock.store.contents import Contents
from flock.store.suspects import Executing, SuspectGroup

T = TypeVar("T")

#: The idempotency key of a request, if it has one.
Key = IdempotencyKey | None
#: The limits of the queue, or the error if the engine is full, which is raised unless the request is a replay.
Room = QueueLimits | EngineFull
#: A function that is called after the commit.
Then = Callable[[T], None]

#: The delay before a failed write or read is retried, in seconds.
RETRY_AFTER_S = 1.0


class DamagedRecord(StoreError):
    """A record cannot be read because it is damaged. ``is_writable``: see ``Unreadable``."""

    is_writable = True


class TakenOver(NamedTuple):
    """The work that an engine took over from a dead one.

    Attributes:
        runs: runs and items that were ended, and runs to resume. They are stubs, unless they are short.
        batches: batches to resume.
        missing: the number of runs and batches that were not taken over, by the agent that is missing.
        is_complete: the dead engine has no unfinished work left.
        suspects: those of the runs, and of the items of the batches, that may have killed it.
    """

    runs: Sequence[Run]
    batches: Sequence[Batch]
    missing: Mapping[str, int]
    is_complete: bool
    suspects: Sequence[SuspectGroup]


class Retry(NamedTuple):
    """A retry: the engine that executes it, and as whom and how; see ``Engine.retry_run``.

    Attributes:
        max_cost: replaces that of the run or the batch, unless it is None.
        options: replace those of the batch. If it is None they stay, but all items may start.
    """

    owner: str
    max_cost: float | None = None
    calls: RetriedCalls = "keep"
    by: str | None = None
    options: BatchOptions | None = None


class Job(NamedTuple):
    """A job in a batch endpoint.

    Attributes:
        job_id: ours. The provider has it as metadata.
        target: of its calls; see ``BatchCall``.
        provider_id: None until the provider is known to have the job.
        is_cancelled: its cancellation was requested here.
        created_at: in microseconds.
    """

    job_id: str
    target: str
    provider_id: str | None
    is_cancelled: bool
    created_at: int

    @property
    def age_s(self) -> float:
        return time.time() - self.created_at / 10**6


class Reply(msgspec.Struct, frozen=True):
    """The reply to a call, or why there is none. With neither, the item makes a normal call instead.

    Attributes:
        usage: with the cost.
        error, error_type, raised: as of a ``Call``.
    """

    completion: Completion | None = None
    usage: Usage | None = None
    model: str | None = None
    error: str | None = None
    error_type: str | None = None
    raised: Raised | None = None


class BatchStore(Protocol):
    """The batches and items in a store."""

    async def dropped(self) -> None:
        """Wait until there are dropped items for ``sweep``."""

    async def stage(
        self, batch: Batch, items: Sequence[Run], max_open_items: int, key: Key = None, *, is_first: bool
    ) -> None:
        """Store *items* of a batch, hidden until it is accepted. They count as open from now on.

        Nothing is stored if *key* was used before. ``accept`` then raises Replayed, which takes precedence over limits,
        or KeyReused.

        Raises:
            EngineFull: there would be more than *max_open_items* unfinished items in all batches together.
            StoreError: the batch was dropped.
        """

    async def accept(
        self, batch: Batch, items: Sequence[Run], max_open_items: int, key: Key, then: Then[Batch], *, is_staged: bool
    ) -> None:
        """Write a batch with its last *items*, make it visible, and call *then* with it.

        Raises:
            Replayed: the same request was accepted under this key before. This takes precedence over limits.
            KeyReused: the key was used for another request.
            EngineStopped: its engine has shut down, or another engine considered it dead.
            EngineFull: there would be more than *max_open_items* unfinished items in all batches together.
            StoreError: the staged items were dropped.
        """

    async def get(self, batch_id: str) -> Batch | None: ...

    async def page(self, flock: str, wanted: BatchFilter) -> Page[Batch]:
        """Return one page of batches, newest first."""

    async def items(self, batch_id: str, after: int, limit: int, statuses: Sequence[RunStatus]) -> Page[Run]:
        """Return up to *limit* items of a batch after the position *after*, in order, without their steps.

        If items are long, a page has fewer of them. An empty page means that there are no more.
        """

    async def pending_items(
        self,
        batch: Batch,
        after: int,
        limit: int,
        before: int | None = None,
        *,
        are_suspects: bool = False,
        have_worked: bool = False,
    ) -> list[Run]:
        """Return up to *limit* pending items between two positions, in order, with their completed steps.

        If items are long, a page has fewer of them, and a long item is returned as a stub. Items that cannot be read
        are skipped; see ``fail_unreadable``. The page is empty if the batch belongs to another engine.

        Args:
            are_suspects: return only suspects.
            have_worked: return only those that have run before, and got an answer.
        """

    async def begin(self, batch: Batch, now: datetime, version: str) -> Batch:
        """Mark a batch as running with this version of its agent, and return it. Raises OwnershipLost."""

    async def end(self, batch: Batch, now: datetime, *, is_day_spent: bool = False, is_spent: bool = False) -> Batch:
        """Write the final status of a batch, and an error if no item completed, or if ``max_cost`` is spent.

        Unfinished items count as failed.

        Args:
            is_day_spent: ``max_cost_per_day`` of its principal is spent.
            is_spent: what is left of ``max_cost`` is too little for more calls.

        A batch with items that wait for answers does not end. Raises OwnershipLost.
        """

    async def fail_unreadable(self, batch: Batch, now: datetime) -> list[tuple[str, str]]:
        """Mark unfinished items as failed. Call it when ``pending_items`` is empty: those left cannot be read.

        Returns: the id of each item and what is wrong with it. Raises OwnershipLost.
        """

    async def cancel_waiting(self, batch: Batch, now: datetime, reason: Outcome | None = None) -> bool:
        """Cancel one chunk of the pending items, and one of those that wait for answers.

        Args:
            reason: the outcome of the items, if the batch is not cancelled by a client.

        Returns: whether there may be more. Raises: OwnershipLost.
        """

    async def cancel_failed(self, batch: Batch, item_ids: Sequence[str]) -> None:
        """Count these failed items as cancelled: the batch has ended early, for their error. Raises OwnershipLost."""

    async def drop_digests(self, batch: Batch) -> Batch:
        """Let no batch take the results of the unfinished items, since another program executes them.

        One chunk of them is changed. After the last one the batch has no ``recipe``. Raises: OwnershipLost.
        """

    async def take_results(self, batch: Batch, after: int, at: datetime, *, is_own: bool) -> int | None:
        """End one chunk of the pending items after the position *after* that equal items have ended elsewhere.

        Args:
            is_own: take the outcomes of earlier items of this batch, instead of the results in other batches.

        Returns: the last position of the chunk; None after the last one. Raises: OwnershipLost.
        """

    async def has_equal_before(self, item: Run) -> bool:
        """Whether an earlier item of the same batch is equal, and its outcome is that of this one too."""

    async def reopen_some(self, batch: Batch) -> Batch:
        """Reopen one chunk of the items to retry. ``reopening`` is None after the last chunk. Raises OwnershipLost."""

    async def request_cancel(self, batch_id: str) -> bool:
        """Request the owner of a batch to cancel it. Returns False if the batch is not active."""

    async def cancels_for(self, owner: str) -> Sequence[str]:
        """Return the batches of *owner* that have a cancellation request."""

    async def reopen(
        self, batch_id: str, only: Sequence[RunStatus], max_open_items: int, retry: Retry, then: Then[Batch | None]
    ) -> Batch | None:
        """Open the next attempt of a final batch. Returns None if it is not final or has no items to retry.

        Raises EngineFull, EngineStopped.
        """

    async def reopen_item(self, run: Run, retry: Retry, then: Then[Batch | None]) -> Batch | None:
        """Like ``reopen``, for one item that failed or was cancelled."""

    async def drop_staged(self, batch_id: str) -> None:
        """Drop a batch that was not accepted."""

    async def drop(self, batch_id: str) -> bool:
        """Hide a batch permanently, unless it is active. ``sweep`` deletes its items."""

    async def sweep(self) -> bool:
        """Delete one chunk of the items of dropped batches. Returns False if there are none left."""


class Store(Protocol):
    """The runs, steps, calls, engines and idempotency keys in a store. It is open while its async context is entered.

    Attributes:
        path: of the file, or ``":memory:"``.
        is_shared: other processes may use it.
        batches: its batches and their items.
        webhooks: its ``WebhookStore``.
        jobs: its ``JobStore``.
        executing: the runs that its engine is executing.
        contents: of the files in the inputs of runs.

    Raises:
        StoreError: on entry, if it cannot be used.
    """

    path: str
    is_shared: bool
    batches: BatchStore
    webhooks: Any
    jobs: Any
    executing: Executing
    contents: Contents

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None:
        """Write pending records, and close. Cancellation: they are written anyway."""

    @property
    def is_public(self) -> bool:
        """Whether every user of the machine can read the file."""

    # Writing

    def save_nowait(self, run: Run, step: Step | None = None, *, is_new: bool = False) -> None:
        """Write *run*, and *step* if its last step is new, at the next ``flush_nowait``.

        Later records of the run replace this one until then, so a short run is written only once, when it ends.
        """

    def discard(self, run_id: str) -> None:
        """Stop tracking a run that was refused and will not be saved again."""

    def flush_nowait(self) -> None:
        """Start to write the records of ``save_nowait``."""

    async def save(self, run: Run, step: Step | None = None, *, is_new: bool = False, shield: bool = False) -> None:
        """Write *run* like ``save_nowait``, and return when it is on disk.

        Raises:
            StoreError: it is not on disk yet. The write will be retried.
            Unstorable: it can never be written.
            OwnershipLost: another engine owns the run now, or the run is in another attempt.

        Cancellation: it is written anyway. With *shield*, this returns when it is on disk nevertheless.
        """

    @property
    def is_writable(self) -> bool:
        """Whether the last transaction succeeded and the file is the one that was opened."""

    def check_writable(self) -> None:
        """Raise StoreError if the store is not writable. A failed transaction is retried every second."""

    def is_behind(self) -> bool:
        """Whether many bytes wait to be written. Raises StoreError if the store is not writable."""

    async def catch_up(self) -> None:
        """Return when everything that waits now is written. Raises StoreError."""

    # The file

    @property
    def is_displaced(self) -> bool:
        """Whether the last ``check_file`` found that the file was removed, replaced or upgraded."""

    async def check_file(self) -> None:
        """Check that the file was not removed, replaced or upgraded. If it was, reads and writes raise StoreError."""

    # Reading

    async def data_version(self) -> int:
        """Return a number that changes with each commit of any process."""

    async def get_run(self, run_id: str) -> Run | None: ...

    async def outline(self, run_id: str) -> Run | None:
        """Return a stub of a run: with ``{}`` in place of its inputs and results, which are not read."""

    async def is_of(self, run_id: str, principal: str) -> bool:
        """Return whether there is such a run of *principal*. Nothing long is read."""

    async def input_bytes(self, run_id: str) -> int:
        """Return the length of the inputs of a run, which are not read, or 0 if there is no such run."""

    async def version(self, run_id: str) -> tuple[Any, ...] | None:
        """Return a value that changes when the outline of a run changes. Reading it takes a few microseconds."""

    async def calls(
        self, run: Run, position: int, after_row: int = 0, tries: int | None = None
    ) -> Sequence[tuple[int, Call]]:
        """Return a page of the finished calls of a step, with their rows. Raises StoreError.

        Args:
            tries: those of the run when the calls were made; None means the current ones.
        """

    async def active_before(self, run: Run) -> str | None:
        """Return the id of the last run of its session that was accepted before *run* and has not ended, or None."""

    async def earlier_runs(self, run: Run, limit: int, max_bytes: int) -> Sequence[Run]:
        """Return completed runs of the session and the agent of *run*, oldest first: the last *limit*, or *max_bytes*.

        Damaged runs are left out.
        """

    async def result_bytes(self, run_id: str, position: int | None) -> int:
        """Return the length of the result of a run or of its step at *position*. Raises RunNotFound, StoreError."""

    async def read_result(self, run_id: str, position: int | None, start: int, length: int) -> bytes:
        """Return up to *length* bytes of the result of a run or of its step at *position*.

        Raises: RunNotFound, StoreError.
        """

    async def short_result(self, run_id: str, position: int | None) -> msgspec.Raw:
        """Return a result as a whole, if it is not damaged. Raises RunNotFound, StoreError."""

    async def list_runs(self, flock: str, wanted: RunFilter) -> Page[Run]:
        """Return one page of runs that are not items, newest first, without steps. A damaged run has an ``error``."""

    async def spent(self, flock: str, wanted: RunFilter) -> Sequence[tuple[str, Usage | None]]:
        """Return the ids of one page of runs, and what each has spent; None if only its steps have its usage."""

    async def account(self, flock: str, principal: str, spent: Mapping[str, tuple[Spent, ...]] = ...) -> Account:
        """Return what a principal may spend in a day, and has spent today.

        Args:
            spent: ``Run.spent_by`` of runs of it whose latest value may not be written yet, by id.
        """

    async def set_budget(self, flock: str, principal: str, max_cost: float | None) -> None:
        """Set what a principal may spend in a day, in US dollars; None means no limit. Raises StoreError."""

    async def usage(self, flock: str, day: date, wanted: UsageFilter) -> Sequence[UsageRow]:
        """Return the usage of one of the days of *wanted*, by the fields that it names. Raises StoreError."""

    async def delete_old_usage(self, flock: str, before: date) -> None:
        """Delete the usage of days before *before*."""

    async def made_by(self, flock: str, key: IdempotencyKey) -> str | None:
        """Return the id of the run or batch that was accepted under *key*, or None."""

    async def secret(self, flock: str) -> str:
        """Return the key of a flock with an engine."""

    async def queue(self, flock: str) -> Queue:
        """Return the queue of runs of these agents, without items. Retried runs do not count for its age."""

    async def last_id(self) -> str | None:
        """Return the id of the newest run."""

    # Changing runs: each method is one transaction

    async def accept(
        self, run: Run, room: Room, key: Key, then: Then[Run] | None = None, newest: Newest | None = None
    ) -> Run | None:
        """Write a new run, if there is room for it, and call *then* with it.

        Args:
            newest: the run must follow this one; see ``Engine.submit``. One that is replaced is deleted if it is final,
                or else cancelled, in the same transaction. Its engine stops it if it is running.

        Returns: the run that is replaced, if it was waiting: it has ended as cancelled.

        Raises:
            Replayed: the same request was accepted under this key before. This takes precedence over limits.
            KeyReused: the key was used for another request.
            EngineStopped: its engine has shut down.
            Conflict: the session has a run after *newest*.
            EngineFull: too many runs of these agents, or of its principal, are queued, in all processes together.
        """

    async def shown_calls(self, run_id: str) -> Mapping[int, Sequence[Call]]:
        """Return the calls of a run for people to see; see ``Engine.get_calls``. Raises StoreError."""

    async def next_calls(self, run_id: str, position: int, number: int, after_row: int) -> Sequence[tuple[int, Call]]:
        """Return a page of calls of a step for people to see, with their rows, from *number* after *after_row* on.

        Only the arguments of questions are read.
        """

    async def save_call(self, run: Run, position: int, call: Call) -> None:
        """Write a finished call of a step; on return it is on disk. Raises StoreError, Unstorable, OwnershipLost."""

    async def suspend(self, run: Run, now: datetime, then: Then[tuple[bool, Run | None]]) -> None:
        """Write *run*, which begins to wait. Call *then* with whether it does: it was not cancelled meanwhile.

        If an answer or a message was there, the run continues at once, and *then* also gets a stub of it.

        Raises StoreError, Unstorable, OwnershipLost.
        """

    async def check_wait(self, run: Run, wait: Question, now: datetime) -> Call | None:
        """Return the answer of a wait of a running step. If there is none, write the waits of *run*, and return None.

        A message is received by that. Raises StoreError, Unstorable, OwnershipLost.
        """

    async def has_answer(self, run: Run, wait: Question) -> bool:
        """Whether ``check_wait`` may find an answer. It only reads."""

    async def send(
        self, run_id: str, name: str, message: msgspec.Raw, key: Key, owner: str, now: datetime, then: Then[Run | None]
    ) -> None:
        """Keep a message to a run. Call *then* with a stub of the run if it waited for it and is ready to start.

        Raises the same as ``Engine.send_message``.
        """

    async def unreceived(self, run_id: str) -> Sequence[str]:
        """Return the names of the messages that a run has not received. Raises StoreError."""

    async def answer(
        self,
        run_id: str,
        call_id: str,
        output: msgspec.Raw,
        by: Principal | None,
        owner: str,
        now: datetime,
        then: Then[Run | None],
    ) -> Run | None:
        """Answer a question. Return a stub of the run if it is ready to start, and call *then* with it; or None.

        Raises the same as ``Engine.answer_call``.
        """

    async def may_answer(self, run_id: str, call_id: str, by: Principal) -> bool:
        """Whether *by* may know of a question. It takes as long for one that does not exist."""

    async def list_questions(self, flock: str, wanted: QuestionFilter, since: int | None = None) -> QuestionPage:
        """Return one page of open questions, the newest run first. It may be empty although there is a ``rest``.

        Args:
            since: ``newest`` of a page that was read before. Only questions that were asked or closed since are
                returned, with a ``status``.

        Raises StoreError.
        """

    async def find_question(self, run_id: str, call_id: str) -> AskedQuestion | None:
        """Return a question that a run has asked, open or not, or None."""

    async def end_waiting(self, run: Run, outcome: Outcome, now: datetime) -> bool:
        """End a waiting run. Returns False if it is no longer waiting."""

    async def expire(self, flock: str, owner: str, now: datetime, then: Callable[[Sequence[Run]], None]) -> None:
        """Answer questions that have expired with their defaults, and end the other runs. Call *then* with the runs."""

    async def request_cancel(self, run_id: str) -> bool:
        """Request the owner of a run to cancel it. Returns False if the run is not active."""

    async def reopen(self, run: Run, limits: QueueLimits, retry: Retry, then: Then[Run | None]) -> Run | None:
        """Open the next attempt of *run*. Returns None if it neither failed nor was cancelled.

        Raises EngineFull, EngineStopped.
        """

    async def delete_run(self, run_id: str) -> bool:
        """Delete a final run that is not an item. Returns False if there is no such run."""

    async def delete_old(
        self, flock: str, before: datetime | None, keep_runs: int | None, limit: int, kept: Collection[str] = ()
    ) -> int:
        """Delete up to *limit* final runs that ended before *before*, or are beyond the newest *keep_runs*.

        A batch counts as one run. It is dropped as a whole, and its items are deleted later by ``BatchStore.sweep``.

        Args:
            kept: ids of runs and batches to skip. The collection is read in the transaction.
        """

    async def delete_unused_files(self, keep_s: float | None = None) -> None:
        """Delete files whose last run was deleted, and those that no run has taken in a day, or in *keep_s*.

        The latter are looked for at most once in an hour, unless *keep_s* is given. Raises StoreError.
        """

    async def delete_old_keys(self, before: datetime) -> None: ...

    async def cancels_for(self, owner: str) -> list[tuple[str, int]]:
        """Return runs of *owner*, and items of its batches, with a cancellation request, and their attempts."""

    async def ended(self, ids: Iterable[str]) -> list[str]:
        """Return those of *ids* whose run or batch is final or deleted."""

    # Engines

    async def register_engine(
        self, engine_id: str, flock: str, agents: Collection[str], program: Program | None = None
    ) -> Program:
        """Register an engine, with a lock file that marks it as alive. The kernel frees the lock if the process dies.

        Args:
            agents: the names of the engine's agents. More may be added to the collection later.

        Returns: the program of the previously started engine of this flock.
        """

    async def unfinished_of_other_flocks(self, flock: str) -> Mapping[str, int]:
        """Return the numbers of unfinished runs and batches of flocks with other names, by name."""

    async def renew_registration(self, engine_id: str, flock: str) -> bool:
        """Register an engine again if its row or lock file is missing. Returns False if its runs were taken over.

        That happens if its lock file was removed. An engine that takes over removes the file before the row, so a file
        that is created after the row was found missing is not removed.
        """

    async def unregister_engine(self, engine_id: str) -> None:
        """Unregister an engine and close its lock file. If it has unfinished work, its row stays for another engine."""

    async def dead_engines(self, flock: str, own_id: str) -> list[str]:
        """Return the engines of this flock whose process has ended."""

    async def may_have_suspects(self, engine_id: str) -> bool:
        """Whether unfinished work of an engine was running in a death before, so that it may have killed it."""

    async def take_over(
        self,
        dead_id: str,
        owner: str,
        now: datetime,
        max_recoveries: int,
        only: str | None = None,
        then: Then[TakenOver] = ...,
    ) -> TakenOver:
        """Make *owner* the owner of the unfinished work of *dead_id* for its agents.

        Runs and batches with a cancellation request are taken over even without their agent. Synchronous runs end as
        interrupted, since their callers are gone. Work that cannot be read ends as failed. The rest stays for a program
        that has its agent. A run that was executed in *max_recoveries* deaths, in two of them alone, ends as crashed.

        Args:
            only: the id of a run or a batch. If given, all other work is ignored.
        """

"""The store: runs, steps, engines and idempotency keys in one SQLite file. ``SQLiteBatchStore`` adds batches.

Every update of a run is fenced by owner and attempt, so a process that was suspended cannot overwrite the work of the
engine that has taken over its runs.
"""

import contextlib
import functools
import glob
import itertools
import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import msgspec
from msgspec.structs import asdict

from flock.agents.program import Program
from flock.errors import EngineFull, RunNotFound
from flock.fair import FairShare
from flock.logs import audit
from flock.runs import (
    Account,
    AskedQuestion,
    Call,
    IdempotencyKey,
    Page,
    Principal,
    Question,
    QuestionFilter,
    QuestionPage,
    Queue,
    QueueLimits,
    Run,
    RunFilter,
    RunStatus,
    Spent,
    Usage,
    UsageFilter,
    UsageRow,
)
from flock.runs.ids import first_id_at
from flock.steps.identity import Newest, new_call_key
from flock.steps.outcomes import Outcome
from flock.store import files, queries, statements, takeover, waiting
from flock.store.batchstore import SQLiteBatchStore
from flock.store.columns import (
    Damaged,
    json_from,
    micros,
    names_json,
    names_of_retriers,
    run_or_remains,
    shown_call_from,
    time_from,
)
from flock.store.database import MEMORY, Database, Durability
from flock.store.jobs import JobStore
from flock.store.port import Key, Retry, Room, Store, TakenOver, Then
from flock.store.suspects import Executing, executed_until_death
from flock.store.webhooks import WebhookStore

T = TypeVar("T")

logger = logging.getLogger("flock.runs")

#: Max files that one transaction deletes.
DELETED_FILES = 1000
#: Later than any stored time, in microseconds.
MAX_TIME = 2**63 - 1
#: How many runs with expired questions one transaction changes.
EXPIRY_CHUNK_SIZE = 500


def _page_of(flock: str, wanted: RunFilter) -> tuple[Callable[[str], str], Mapping[str, Any]]:
    """Return the query for a page of runs, as a function of the columns, and its values."""
    statuses = RunStatus if wanted.status is None else [RunStatus(wanted.status)]
    low = None if wanted.created_after is None else first_id_at(wanted.created_after, 1)
    high = None if wanted.created_before is None else first_id_at(wanted.created_before)
    values = asdict(wanted) | {"flock": flock, "low": low, "high": high, "limit": wanted.limit + 1}
    names = [name for name in statements.RUN_CONDITIONS if values[name] is not None]
    return lambda columns: statements.run_page(columns, statuses, names), values


class SQLiteStore(Database, Store):
    """A ``Store`` in a file, or in memory.

    Args:
        path: of the file, which is created if it does not exist. Its folder must exist. ``":memory:"`` stores runs in
            memory only.
        durability: what a commit survives.
    """

    def __init__(self, path: str | Path = MEMORY, *, durability: Durability = "power") -> None:
        super().__init__(path, durability=durability)
        self.batches = SQLiteBatchStore(self)
        self.webhooks = WebhookStore(self)
        self.jobs = JobStore(self)
        self.executing = Executing()
        self._engine_lock: IO[bytes] | None = None
        #: until when runs whose waits have expired are left alone, as they cannot go on here
        self._put_off = dict[str, datetime]()

    async def __aenter__(self) -> Self:
        self.batches.has_dropped = anyio.Event()  # an event belongs to one event loop
        return await super().__aenter__()

    async def get_run(self, run_id: str) -> Run | None:
        return self.read(lambda db: queries.find_run(db, run_id))

    async def outline(self, run_id: str) -> Run | None:
        return self.read(lambda db: queries.find_run(db, run_id, is_outline=True))

    def _first(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        """Return the first row of a query."""
        row: tuple[Any, ...] | None = self.read(lambda db: db.execute(query, values).fetchone())
        return row

    async def is_of(self, run_id: str, principal: str) -> bool:
        return self._first(statements.IS_OF_PRINCIPAL, run_id, principal, principal) is not None

    async def input_bytes(self, run_id: str) -> int:
        row = self._first(statements.INPUT_BYTES, run_id)
        return 0 if row is None else row[0]

    async def version(self, run_id: str) -> tuple[Any, ...] | None:
        return self._first(statements.VERSION, run_id)

    async def calls(
        self, run: Run, position: int, after_row: int = 0, tries: int | None = None
    ) -> Sequence[tuple[int, Call]]:
        return self.read(lambda db: queries.find_calls(db, run, position, after_row, tries or run.tries))

    async def active_before(self, run: Run) -> str | None:
        row = self._first(statements.ACTIVE_BEFORE, run.flock, run.session_id, run.principal, run.run_id)
        return None if row is None else row[0]

    async def earlier_runs(self, run: Run, limit: int, max_bytes: int) -> Sequence[Run]:
        return self.read(lambda db: queries.earlier_runs(db, run, limit, max_bytes))

    async def result_bytes(self, run_id: str, position: int | None) -> int:
        return self.read(self._of_result(run_id, position, len))

    async def read_result(self, run_id: str, position: int | None, start: int, length: int) -> bytes:
        def read(result: sqlite3.Blob) -> bytes:
            result.seek(start)
            return result.read(length)

        # In a thread, since SQLite skips what is before the piece, page by page.
        return await self.read_in_thread(self._of_result(run_id, position, read))

    async def short_result(self, run_id: str, position: int | None) -> msgspec.Raw:
        return self.read(self._of_result(run_id, position, lambda result: json_from(result.read())))

    def _of_result(
        self, run_id: str, position: int | None, use: Callable[[sqlite3.Blob], T]
    ) -> Callable[[sqlite3.Connection], T]:
        """Return a query for what *use* returns for a result. It raises RunNotFound."""
        table, query, values = "runs", statements.ROW_OF_RUN, (run_id,) if position is None else (run_id, position)
        if position is not None:
            table, query = "steps", statements.ROW_OF_STEP

        def find(db: sqlite3.Connection) -> T:
            row = db.execute(query, values).fetchone()
            if row is None:
                raise RunNotFound(run_id)
            with db.blobopen(table, "result", row[0], readonly=True) as blob:
                return use(blob)

        return find

    async def list_runs(self, flock: str, wanted: RunFilter) -> Page[Run]:
        columns = statements.list_columns(wanted.with_inputs, wanted.with_results)
        query, values = _page_of(flock, wanted)
        return self.read(
            lambda db: Page(wanted.limit, map(run_or_remains, queries.rows_of(db, query, values, columns)))
        )

    async def spent(self, flock: str, wanted: RunFilter) -> Sequence[tuple[str, Usage | None]]:
        query, values = _page_of(flock, wanted)
        return self.read(lambda db: queries.find_spent(db, query(statements.SPENT_COLUMNS), values))

    async def account(self, flock: str, principal: str, spent: Mapping[str, tuple[Spent, ...]] = {}) -> Account:
        return self.read(lambda db: queries.find_account(db, flock, principal, spent))

    async def set_budget(self, flock: str, principal: str, max_cost: float | None) -> None:
        await self.change(lambda db: queries.set_budget(db, flock, principal, max_cost))

    async def usage(self, flock: str, day: date, wanted: UsageFilter) -> Sequence[UsageRow]:
        return self.read(lambda db: queries.find_usage(db, flock, day, wanted))

    async def delete_old_usage(self, flock: str, before: date) -> None:
        values = (flock, before.toordinal())
        await self.change(lambda db: db.execute(statements.DELETE_OLD_USAGE, values) and None)

    async def made_by(self, flock: str, key: IdempotencyKey) -> str | None:
        found = self._first(statements.FIND_KEY, flock, key.scoped_key)
        return None if found is None else found[1]

    async def secret(self, flock: str) -> str:
        return str(self.read(lambda db: db.execute(statements.SECRET_OF_FLOCK, (flock,)).fetchone()[0]))

    async def queue(self, flock: str) -> Queue:
        values = (flock, names_json(self.agents))
        queued = self.read(lambda db: db.execute(statements.QUEUE, values).fetchall())
        (asking,) = self.read(lambda db: db.execute(statements.COUNT_ASKING, values).fetchone())
        await anyio.lowlevel.checkpoint()  # each part takes milliseconds
        found = self.read(lambda db: db.execute(statements.BACKLOG, {"flock": flock}).fetchone())
        questions, asked_at, webhooks, oldest_webhook = found
        return Queue(
            sum(count for _, count, _ in queued),
            time_from(min((at for *_, at in queued if at is not None), default=None)),
            asking,
            by_agent={name: count for name, count, _ in queued},
            questions=questions,
            oldest_question_at=None if asked_at is None else datetime.fromisoformat(asked_at),
            webhooks=webhooks,
            oldest_webhook_at=time_from(oldest_webhook),
        )

    async def last_id(self) -> str | None:
        row = self._first(statements.NEWEST_ID)
        return None if row is None else row[0]

    # Changing runs: each method is one transaction

    async def accept(
        self, run: Run, room: Room, key: Key, then: Then[Run] | None = None, newest: Newest | None = None
    ) -> Run | None:
        ended: Run | None = None

        def apply(db: sqlite3.Connection) -> Run:
            nonlocal ended
            queries.check_key(db, run.flock, key)
            queries.check_engine(db, run.owner)
            queries.check_latest(db, run, newest)
            if isinstance(room, EngineFull):
                raise room
            self.contents.check(run)
            self._queued.check_room(db, run.flock, self.agents, run.principal, room)
            ended = waiting.drop(db, newest.run_id, run.created_at) if newest and newest.is_replaced else None
            self._queued.insert(db, run, key)
            return run

        await self.change(apply, then)
        return ended

    async def shown_calls(self, run_id: str) -> Mapping[int, Sequence[Call]]:
        found, share = dict[int, list[Call]](), FairShare()
        try:
            for position, *row in self.read(lambda db: queries.find_shown_calls(db, run_id)):
                found.setdefault(position, []).append(shown_call_from(row))
                await share.checkpoint()
        except Damaged as exc:
            raise self._unreadable(exc) from exc
        return found

    async def next_calls(self, run_id: str, position: int, number: int, after_row: int) -> Sequence[tuple[int, Call]]:
        return self.read(lambda db: queries.find_next_calls(db, run_id, position, number, after_row))

    async def save_call(self, run: Run, position: int, call: Call) -> None:
        await self.change(lambda db: queries.write_call(db, run, position, call))

    async def suspend(self, run: Run, now: datetime, then: Then[tuple[bool, Run | None]]) -> None:
        await self.change(lambda db: waiting.suspend(db, run, now), then)

    async def check_wait(self, run: Run, wait: Question, now: datetime) -> Call | None:
        return await self.change(lambda db: waiting.check_wait(db, run, wait, now))

    async def has_answer(self, run: Run, wait: Question) -> bool:
        return self.read(lambda db: waiting.has_answer(db, run, wait))

    async def send(
        self, run_id: str, name: str, message: msgspec.Raw, key: Key, owner: str, now: datetime, then: Then[Run | None]
    ) -> None:
        await self.change(lambda db: waiting.send(db, run_id, name, message, key, owner, now), then)

    async def unreceived(self, run_id: str) -> Sequence[str]:
        return self.read(lambda db: [name for (name,) in db.execute(statements.NAMES_OF_MESSAGES, (run_id,))])

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
        answered = list[tuple[str, dict[str, Any]]]()

        def apply(db: sqlite3.Connection) -> Run | None:
            answered.clear()  # it may be repeated
            return waiting.answer(db, run_id, call_id, output, by, owner, now, answered)

        run = await self.change(apply, then)
        for words, about in answered:
            audit("question.answered", words, about | {"call_id": call_id}, None if by is None else by.name)
        return run

    async def may_answer(self, run_id: str, call_id: str, by: Principal) -> bool:
        return self.read(lambda db: waiting.may_answer(db, run_id, call_id, by))

    async def list_questions(self, flock: str, wanted: QuestionFilter, since: int | None = None) -> QuestionPage:
        return self.read(lambda db: waiting.list_questions(db, flock, wanted, since))

    async def find_question(self, run_id: str, call_id: str) -> AskedQuestion | None:
        return self.read(lambda db: waiting.find_question(db, run_id, call_id))

    async def end_waiting(self, run: Run, outcome: Outcome, now: datetime) -> bool:
        return await self.change(lambda db: waiting.end(db, run, outcome, now))

    async def expire(self, flock: str, owner: str, now: datetime, then: Callable[[Sequence[Run]], None]) -> None:
        values = (flock, micros(now))
        put_off = self._put_off = {run_id: until for run_id, until in self._put_off.items() if until > now}
        found = self.read(lambda db: [row[0] for row in db.execute(statements.EXPIRED_RUNS, values)])
        expired = [run_id for run_id in found if run_id not in put_off]
        for start in range(0, len(expired), EXPIRY_CHUNK_SIZE):
            run_ids = expired[start : start + EXPIRY_CHUNK_SIZE]
            await self.change(functools.partial(waiting.expire, run_ids, self.agents, put_off, owner, now), then)

    async def request_cancel(self, run_id: str) -> bool:
        return await self.change(lambda db: db.execute(statements.CANCEL_RUN, (run_id,)).rowcount == 1)

    async def reopen(self, run: Run, limits: QueueLimits, retry: Retry, then: Then[Run | None]) -> Run | None:
        def apply(db: sqlite3.Connection) -> Run | None:
            queries.check_engine(db, retry.owner)
            self._queued.check_room(db, run.flock, self.agents, run.principal, limits)
            values = (retry.calls == "again", names_of_retriers(run, retry.by), retry.owner, run.run_id)
            is_reopened = db.execute(statements.REOPEN_RUN, values).rowcount == 1
            if is_reopened and retry.max_cost is not None:
                db.execute(statements.SET_MAX_COST, (retry.max_cost, run.run_id))
            return queries.find_run(db, run.run_id) if is_reopened else None

        return await self.change(apply, then)

    async def delete_run(self, run_id: str) -> bool:
        return await self.change(lambda db: queries.delete_run(db, run_id))

    async def delete_old(
        self, flock: str, before: datetime | None, keep_runs: int | None, limit: int, kept: Collection[str] = ()
    ) -> int:
        def apply(db: sqlite3.Connection) -> int:
            bounds = [(first_id_at(before), micros(before))] if before is not None else []
            if keep_runs is not None:
                row = db.execute(statements.NTH_NEWEST, {"flock": flock, "offset": max(0, keep_runs - 1)}).fetchone()
                bounds += [(row[0], MAX_TIME)] if row is not None else []
            deleted = 0
            for bound, latest in bounds:
                values = {"flock": flock, "bound": bound, "latest": latest, "limit": limit, "kept": names_json(kept)}
                deleted += queries.delete_runs(db, [run_id for (run_id,) in db.execute(statements.OLD_RUNS, values)])
                deleted += db.execute(statements.DROP_OLD_BATCHES, values).rowcount
            return deleted

        return await self.change(apply)

    async def delete_unused_files(self, keep_s: float | None = None) -> None:
        old, chunk = self.contents.old(keep_s), (DELETED_FILES,)
        while released := self.read(lambda db: db.execute(statements.RELEASED_FILES, chunk).fetchall()):
            await self._delete_files(released)
        while found := await anyio.to_thread.run_sync(lambda: list(itertools.islice(old, *chunk))):
            await self._delete_files(found)

    async def _delete_files(self, found: Sequence[tuple[str, float]]) -> None:
        """Delete those that no run has, and were neither sent nor named after that time.

        This holds for what is committed, in which no other run of the same transaction is deleted: if that fails, a
        run has its files.
        """

        def has_run(db: sqlite3.Connection, name: str) -> bool:
            return db.execute(statements.HAS_RUN_WITH_FILE, (name,)).fetchone() is not None

        unused = self.read(lambda db: {name for name, _ in found if not has_run(db, name)})

        def apply(db: sqlite3.Connection) -> None:
            for name, at in found:
                is_taken = has_run(db, name)
                if name in unused and not is_taken:
                    self.contents.delete(name, at)
                if name in unused or is_taken:  # otherwise, its last run is deleted in this transaction
                    db.execute(statements.FORGET_RELEASED_FILE, (name, at))

        await self.change(apply)
        await anyio.lowlevel.checkpoint()

    async def delete_old_keys(self, before: datetime) -> None:
        await self.change(lambda db: db.execute(statements.DELETE_OLD_KEYS, (micros(before),)) and None)

    async def cancels_for(self, owner: str) -> list[tuple[str, int]]:
        return self.read(lambda db: db.execute(statements.RUNS_TO_CANCEL, (owner, owner)).fetchall())

    async def ended(self, ids: Iterable[str]) -> list[str]:
        ids_json = msgspec.json.encode(list(ids)).decode()
        return self.read(lambda db: [row[0] for row in db.execute(statements.ENDED, (ids_json,))])

    # Engines

    async def register_engine(
        self, engine_id: str, flock: str, agents: Collection[str], program: Program | None = None
    ) -> Program:
        self.agents = agents

        def apply(db: sqlite3.Connection) -> Program:
            row = db.execute(statements.PROGRAM_OF_FLOCK, (flock,)).fetchone()
            values = (flock, msgspec.json.encode(program or Program()).decode(), new_call_key())
            db.execute(statements.SET_PROGRAM_OF_FLOCK, values)
            return Program() if row is None else Program.from_json(row[0])

        try:
            if self.is_shared:
                self._lock_engine(engine_id)
            await self._insert_engine(engine_id, flock)
        except BaseException:  # it is in no table, so no other engine would find the file and remove it
            with contextlib.suppress(OSError):
                files.remove(self.lock_of(engine_id))
            raise
        if self.is_shared:
            self._remove_unknown_locks()
        return await self.change(apply)

    def _remove_unknown_locks(self) -> None:
        """Remove the files of engines that died before they were in the table, so that no other engine finds them."""
        known = self.read(lambda db: {self.lock_of(row[0]) for row in db.execute(statements.ALL_ENGINES)})
        for path in set(glob.glob(f"{glob.escape(self.path)}-engine-*")) - known:
            with contextlib.suppress(OSError), files.exclusive_lock(path):  # a file that is locked stays
                pass

    async def unfinished_of_other_flocks(self, flock: str) -> Mapping[str, int]:
        def find(db: sqlite3.Connection) -> Mapping[str, int]:
            others = [name for (name,) in db.execute(statements.OTHER_FLOCKS, (flock,)).fetchall()]
            counts = {name: db.execute(statements.COUNT_UNFINISHED, {"flock": name}).fetchone()[0] for name in others}
            return {name: number for name, number in counts.items() if number}

        return self.read(find)

    async def renew_registration(self, engine_id: str, flock: str) -> bool:
        is_known = self._first(statements.FIND_ENGINE, engine_id) is not None
        if not is_known or not files.is_locked(self.lock_of(engine_id)):
            files.close_lock(self._engine_lock)
            self._lock_engine(engine_id)
        if not is_known:
            await self._insert_engine(engine_id, flock)
        return is_known

    def _lock_engine(self, engine_id: str) -> None:
        self._engine_lock = files.acquire_lock(self.lock_of(engine_id), self._file.mode)
        self.executing.open(self._engine_lock)

    async def _insert_engine(self, engine_id: str, flock: str) -> None:
        values = (engine_id, flock, micros(datetime.now(UTC)))
        await self.change(lambda db: db.execute(statements.INSERT_ENGINE, values) and None)

    async def unregister_engine(self, engine_id: str) -> None:
        def apply(db: sqlite3.Connection) -> None:
            if takeover.remove_engine(db, engine_id) and self.is_shared:
                files.remove(self.lock_of(engine_id))  # before the commit: if it fails, another engine tries again

        self.executing.forget()
        try:
            await self.change(apply)
        finally:
            if self.is_shared:
                files.close_lock(self._engine_lock)

    async def dead_engines(self, flock: str, own_id: str) -> list[str]:
        others = self.read(lambda db: [row[0] for row in db.execute(statements.OTHER_ENGINES, (flock, own_id))])
        return [engine_id for engine_id in others if not files.is_locked(self.lock_of(engine_id))]

    async def may_have_suspects(self, engine_id: str) -> bool:
        return self._first(statements.MAY_HAVE_SUSPECTS, engine_id, engine_id) is not None

    async def take_over(
        self,
        dead_id: str,
        owner: str,
        now: datetime,
        max_recoveries: int,
        only: str | None = None,
        then: Then[TakenOver] = lambda taken: None,
    ) -> TakenOver:
        # In a thread, since there may be many long runs.
        unfinished = await self.read_in_thread(lambda db: takeover.find_unfinished(db, dead_id, self.agents, only))
        executed = executed_until_death(self.lock_of(dead_id))

        def apply(db: sqlite3.Connection) -> TakenOver:
            taken = takeover.take_over(db, unfinished, dead_id, owner, now, executed, max_recoveries)
            if taken.is_complete:
                files.remove(f"{self.path}-live-{dead_id}")
                files.remove(self.lock_of(dead_id))  # before the commit; see renew_registration
            return taken

        def taken_over(taken: TakenOver) -> None:
            self.batches.has_dropped.set()
            then(taken)

        return await self.change(apply, taken_over)

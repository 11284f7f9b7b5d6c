"""Runs of random programs whose entries are in memory, in place of an engine and a store, so that they are cheap.

The step is executed by the same ``flock.steps``. A process that dies leaves the entries that were acknowledged, and
some of those that were being saved.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any

import anyio
import msgspec
from msgspec.structs import asdict, replace

from flock.engine.runner import _absorb_cancellation, _without
from flock.models.llm import ModelClient
from flock.runs import Call, Question, Run, RunStatus, now
from flock.runs.records import CALL_IDS
from flock.steps.answers import answer_of, awaited, is_expired
from flock.steps.executor import ActiveRun, StepExecutor, WaitingForAnswers
from flock.steps.outcomes import CANCELLED
from tests.proof.generator import End, Fate
from tests.proof.schedules import Schedule
from tests.proof.workflows import FLOCK, MODEL, Statement
from tests.proof.world import ANSWER_S, LIMITS, World, attempt, die, in_processes, quiet

__all__ = ["memories"]

#: How long it takes to save an entry.
SAVE_S = (0.0, 0.0, 0.001, 0.1)
TIMEOUT_S = 1e9


class Memory:
    """What is left of a run when its process dies.

    Attributes:
        run: its record.
        calls: its entries, each with its try.
        kept: how many of them are acknowledged, so that they are not lost.
    """

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng, self.save_s = world, rng, SAVE_S if world.has_late_timers else SAVE_S[:1]
        ids: dict[str, Any] = {"run_id": "run", "flock": FLOCK.name, "agent_name": "main", "call_ids": CALL_IDS}
        self.run = Run(inputs=msgspec.Raw(b"{}"), is_async=True, created_at=now(), **ids)
        self.calls, self.kept = list[tuple[int, Call]](), 0
        self.messages = list[tuple[str, msgspec.Raw]]()

    def die(self) -> None:
        """Some of the entries that were being saved are lost: all after one of them, since a store keeps the order."""
        self.kept = self.rng.randint(self.kept, len(self.calls))
        del self.calls[self.kept :]

    async def save(self, call: Call) -> None:
        self.calls.append((self.run.tries, call))
        count = len(self.calls)
        await asyncio.sleep(self.rng.choice(self.save_s))
        self.kept = max(self.kept, count)

    def answer(self, wait: Question, output: msgspec.Raw) -> None:
        """Keep the answer of a wait, or its default."""
        self.calls.append((self.run.tries, answer_of(wait, output, now())))
        self.kept = len(self.calls)
        self.run = replace(self.run, waiting_for=_without(self.run.waiting_for, wait.call_id))
        self._resume()

    def suspend(self, run: Run) -> None:
        """The run waits, unless there is an answer already."""
        self.run = run
        if any(self.answer_of(wait) for wait in run.waiting_for):
            self._resume()

    def _resume(self) -> None:
        if self.run.status is RunStatus.WAITING:
            self.run = replace(self.run, status=RunStatus.STARTING)

    def send(self, name: str, message: msgspec.Raw) -> None:
        """Keep a message. If the run waits for it, the run continues."""
        if self.run.status is RunStatus.WAITING and (wait := awaited(self.run, name)) is not None:
            self.answer(wait, message)
        else:
            self.messages.append((name, message))

    def reopen(self) -> None:
        """Start the next attempt; see ``REOPENED`` of a store."""
        more = {"attempt": self.run.attempt + 1, "journal": self.run.first_try, "earlier_error": self.run.error}
        gone = dict.fromkeys(("result", "error", "error_type", "started_at", "completed_at"))
        self.run = replace(self.run, status=RunStatus.STARTING, waiting_for=(), worked_s=0.0, **gone, **more)

    def answer_of(self, wait: Question) -> Call | None:
        """Return the answer of a wait, if there is one: also the next message, which is then received."""
        message = next((each for each in self.messages if wait.kind == "message" and each[0] == wait.question), None)
        if message is not None:
            self.messages.remove(message)
            self.answer(wait, message[1])
        of_wait = (call for tries, call in self.calls if call.call_id == wait.call_id and tries == self.run.tries)
        return next((call for call in of_wait if call.error is None), None)


def _placed(calls: Iterable[Call]) -> Sequence[Call]:
    """Return *calls*, with the place of each answer that its step has received while it ran."""
    found = list[Call]()
    for call in calls:
        given = [i for i, each in enumerate(found) if each.call_id == call.call_id and each.place is None]
        if call.is_answer and call.place is not None and given:
            found[given[-1]] = call
        else:
            found.append(call)
    return found


class Execution(ActiveRun):
    """An execution of the step; see ``StoredRun``, which does the same with a store."""

    has_calls = True

    def __init__(self, memory: Memory, expect: Callable[[Question], None]) -> None:
        super().__init__(memory.run, TIMEOUT_S, is_again=memory.run.started_at is not None)
        self.memory, self._expect = memory, expect

    async def started(self, run: Run, agent: Any) -> None:
        self.run = self.memory.run = run

    async def finished_calls(self) -> Sequence[Call]:
        return _placed(call for tries, call in self.memory.calls if tries == self.run.tries)

    async def earlier_calls(self, run: Run) -> Sequence[Call]:
        return _placed(call for tries, call in self.memory.calls if run.first_try <= tries < run.tries)

    async def keep_call(self, call: Call) -> None:
        run = self.memory.run
        self.run = self.memory.run = replace(run, waiting_for=_without(run.waiting_for, call.call_id))
        await self.memory.save(call)

    async def check_wait(self, wait: Question) -> Call | None:
        await asyncio.sleep(self.memory.rng.choice(self.memory.save_s))
        run, call = self.memory.run, self.memory.answer_of(wait)
        waits = _without(run.waiting_for, wait.call_id)
        self.run = self.memory.run = replace(run, waiting_for=waits if call is not None else (*waits, wait))
        if call is None:
            self._expect(wait)
        return call


class Process:
    """Executes a run until it ends, or the process does."""

    def __init__(self, memory: Memory, end: End | None, cancel: End | None, loop: Schedule) -> None:
        self.memory, self.world, self._loop = memory, memory.world, loop
        self._executor = StepExecutor(
            FLOCK.agents,
            ModelClient(transport=MODEL.transport),
            [self.world],
            limits=LIMITS,
            max_steps=100,
            expose_errors=True,
            prices={},
        )
        self._active: Execution | None = None
        self._changed, self._is_stopped, self._is_cancelled = asyncio.Event(), False, False
        self._expected = set[str]()
        self.world.send = self._send
        self.world.at(end, loop, die if end is not None and end.is_kill else self._stop)
        if cancel is not None:
            self.world.at(cancel, loop, self._cancel)

    def _stop(self) -> None:
        self.world.stop()
        self._is_stopped = True
        if self._active is not None:
            self._executor.stop(self._active)
        self._changed.set()

    def _cancel(self) -> None:
        self.world.stop()
        self._is_cancelled = True
        if self._active is not None:
            self._active.cancel()
        self._changed.set()

    def expect(self, wait: Question) -> None:
        """A person sees a question, and answers it at a random moment."""
        if wait.is_question and wait.call_id not in self._expected:
            self._expected.add(wait.call_id)
            self._loop.call_later(self.memory.rng.choice(ANSWER_S), self._answer, wait)

    def _answer(self, wait: Question) -> None:
        if all(each.call_id != wait.call_id for each in self.memory.run.waiting_for):
            return  # it was cancelled
        if wait.call_id in self.world.answered:
            self.world.problem(f"{wait.question!r} is asked again after its answer")
        self.world.answered.add(wait.call_id)
        self.memory.answer(wait, msgspec.Raw(wait.question.partition(" ")[0].encode()))
        self._notify()

    def _send(self, at: str, number: int) -> None:
        if not self.memory.run.status.is_final:
            self.memory.send(f"to-{at}", msgspec.Raw(str(number).encode()))
            self._notify()
        self.world.sent(at)

    def _notify(self) -> None:
        self._changed.set()
        if self._active is not None and self._active.context is not None:
            self._active.context.journal.note_answer()

    async def run(self) -> Run | None:
        """Return the run when it has ended, or None if the process has stopped."""
        while True:
            if self.memory.run.status.is_final:
                if not self.world.should_retry(self.memory.run):
                    return self.memory.run
                self.memory.reopen()
                self._is_cancelled = False
            if self.memory.run.status is RunStatus.WAITING:
                await self._until_answered()
            if self._is_stopped:
                return None
            if self._is_cancelled:
                self._end(asdict(CANCELLED))
            else:
                await self._execute()

    async def _until_answered(self) -> None:
        for wait in (waits := self.memory.run.waiting_for):
            self.expect(wait)
        while self.memory.run.status is RunStatus.WAITING and not (self._is_stopped or self._is_cancelled):
            for wait in waits:
                if is_expired(wait, now()) and isinstance(wait.default, msgspec.Raw):
                    self.memory.answer(wait, wait.default)
            due = [(wait.expires_at - now()).total_seconds() for wait in waits if wait.expires_at is not None]
            self._changed.clear()
            if self.memory.run.status is RunStatus.WAITING:
                with anyio.move_on_after(min(due, default=None)):
                    await self._changed.wait()

    async def _execute(self) -> None:
        """Execute the step once; see ``Runner``."""
        active = self._active = Execution(self.memory, self.expect)
        end: dict[str, Any] | None = None
        failure: BaseException | None = None
        try:
            with active.scope:
                step = await self._executor.execute(active)
                end = {"status": RunStatus.COMPLETED, "result": step.result}
        except BaseException as exc:
            failure = exc
        self._active = None
        if end is None and self._is_stopped:
            return
        await _absorb_cancellation()
        if isinstance(failure, WaitingForAnswers) and not active.cancel_requested:
            more = {"waiting_for": tuple(failure.questions), "worked_s": active.worked_s}
            self.memory.suspend(replace(self.memory.run, status=RunStatus.WAITING, **more))
            return
        if end is None:
            end = asdict(await self._executor.outcome_of(active, failure))
        self._end({**end, "dropped": active.dropped})

    def _end(self, end: dict[str, Any]) -> None:
        self.memory.run = replace(self.memory.run, completed_at=now(), **end)
        self._executor.notify("run_ended", self.memory.run)


def _trial(world: World, fate: Fate, rng: random.Random) -> Run:
    memory = Memory(world, rng)

    def process(number: int, end: End | None, loop: Schedule) -> Coroutine[Any, Any, Run | None]:
        memory.die()
        return Process(memory, end, None if end else fate.cancel, loop).run()

    return in_processes(world, fate, process)


@contextlib.contextmanager
def memories() -> Iterator[Callable[[Statement, Fate], None]]:
    """Yield a function that executes programs as ``attempt`` does."""
    with quiet():
        yield lambda program, fate: attempt(program, fate, _trial, "--in-memory --program")

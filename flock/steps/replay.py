"""The order in which the calls of a step start and end, and that they end in the same order if the step runs again.

Starts and ends are numbered in one sequence; see ``Place``. When the step runs again, a stored end is delivered after
all starts and ends with lower numbers, so that a race has the same winner. What is executed for the first time ends
after all stored ends. A call that does not start again holds up the others only for a while.
"""

import asyncio
import bisect
import contextlib
import functools
import math
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import anyio
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from flock.agents.questions import SLEEP, TIMEOUT, TIMER
from flock.runs import Call, added
from flock.runs.records import OVERTAKEN, Mark, Place
from flock.scopes import Signal, clocks_stopped, current_task, loop_clock

#: Between the id of a call and that of a call that it makes.
NESTED = "~"
#: How many iterations of the event loop other tasks get to act before the next end is delivered.
CHECKPOINTS = 12
#: How many of them a step gets to leave a block before a time-out of the block counts.
SETTLING = 50
#: How soon a call is cancelled after an end that is the cause, and how much of a time-out may pass unseen, in seconds.
AT_ONCE_S, SKIPPED_S = 0.001, 0.05
#: Marks of about this size, in bytes, are stored with one call, since a cluster takes at most 2 MiB at once. The next
#: call has the others.
MAX_MARK_BYTES = 256 * 1024
#: About what the numbers of a mark take, as JSON.
MARK_BYTES = 25


class Entry:
    """A call of the step, in all executions.

    Attributes:
        start, end: the numbers of its start and of its end; 0 before that. An answer that was not delivered has a
            number after those of all other ends.
        seen: the number of when its end was delivered, if calls have started since it was stored; 0 otherwise.
        since: the last number before the execution that delivered it.
        start_s: when it started in this execution; see ``Place``.
        seen_before: how many ends were delivered before it started in this execution.
        stored: how it ended in an earlier execution; None if it is to be executed.
        failure: how it had failed, if the program has cancelled it later.
        is_known: an earlier execution has started it.
        is_unseen: no execution has delivered its end.
        is_overtaken: another call was cancelled before its end was delivered.
    """

    __slots__ = (
        "call_id",
        "end",
        "failure",
        "is_known",
        "is_overtaken",
        "is_unseen",
        "seen",
        "seen_before",
        "since",
        "start",
        "start_s",
        "stored",
    )

    def __init__(self, call_id: str, start: int = 0, stored: Call | None = None) -> None:
        self.call_id, self.start, self.stored = call_id, start, stored
        self.failure: Call | None = None
        self.end = self.seen = self.since = self.seen_before = 0
        self.start_s, self.is_known, self.is_unseen, self.is_overtaken = 0.0, bool(start), stored is not None, False

    @property
    def place(self) -> Place:
        """That of a call which was cancelled."""
        assert self.stored is not None
        assert self.stored.place is not None
        return self.stored.place

    @property
    def is_shifted(self) -> bool:
        """Whether it started at another step time than when it was cancelled, since time was skipped."""
        return abs(self.start_s - self.place.start_s) > SKIPPED_S

    @property
    def is_late(self) -> bool:
        """Whether it gets the result of an equal call that the program had cancelled."""
        return self.stored is not None and self.stored.place is not None and self.stored.place.start != self.start


class Replay:
    """The starts and ends of one execution of a step.

    Args:
        calls: those that earlier executions have finished, in the order in which they were stored.
        grace_s: how long to wait for a call that does not start again, in seconds.

    Attributes:
        calls: those of *calls* that are no longer, or have never been, ``contained``.
        last_start: the number of the last start of a call, in any execution.
        mixed_up: the name of equal calls that ran at the same time and ended differently, or not all of which ended, if
            there are any but sleeps. Only the order in which they start tells them apart.
    """

    def __init__(self, calls: Sequence[Call], grace_s: float) -> None:
        # Each step makes one. ``dict[int, Mark]()`` takes 17 times as long as ``{}``.
        self._grace_s = grace_s
        self._time = loop_clock()
        self._began_at = self._recurred_at = self._struck_at = self._saw_at = self._time()
        #: how much longer it had taken before until the end that was delivered last. It is not negative, since the
        #: execution that took less time may have skipped some itself.
        self._skipped_s = 0.0
        #: how long nothing had recurred when calls were waited for in vain, up to what recurred last
        self._vain_s = 0.0
        #: when the last of these waits ended
        self._gave_up_at = self._began_at
        self._recurred = Signal()
        #: the last number, those of the last start and the last end of this execution, and that up to which it is
        #: stored that the next one was not delivered
        self._number = self._new_start = self._new_end = self._delayed = 0
        #: how many ends were delivered in this execution, the task that has seen the last of those of earlier ones, and
        #: when that had ended
        self._seen_count, self._seen_in, self._seen_end_s = 0, current_task(), math.inf
        #: the last number of earlier executions
        self._known = 0
        #: the ends of this execution that are neither delivered, nor stored to have been so when a call was cancelled
        self._returned: dict[int, Mark] = {}
        #: the number of the first of those of which that is stored. The program may have cancelled that call too
        self._unsure = math.inf
        self.last_start = 0
        #: those that have not started in this execution, by call; first those that have started before
        self._expected: defaultdict[str, deque[Entry]] = defaultdict(deque)
        #: those of them that have ended, by the call that contains them and their name
        self._ended: defaultdict[tuple[str, str], dict[Entry, None]] = defaultdict(dict)
        #: results that came after the program had stopped waiting for them. The next equal call returns them.
        self._late: defaultdict[str, deque[Call]] = defaultdict(deque)
        #: the starts that have not recurred, in order, and the number of what they come after
        self._missing: dict[int, int] = {}
        #: those of ends that are not delivered, in order, each with its call and that of when it was delivered before
        self._ends: dict[int, Mark] = {}
        #: how long it takes until these ends again, in seconds, by the number of the end
        self._end_s: dict[int, float] = {}
        #: what wakes the calls that wait for their turn, by the number of their end
        self._turns: dict[int, anyio.Event] = {}
        #: answers that were not delivered, of calls that are not known to have started, by the number of their end
        self._never_started: dict[int, Entry] = {}
        #: the ends of answers that no execution is known to have delivered, and whose calls have started
        self._guessed: set[int] = set()
        #: the ends of those that let no limit of a call pass
        self._held: set[int] = set()
        #: the ends of calls that wait to be cancelled again, each with the time until which other cancellations wait
        self._to_cancel: dict[int, float] = {}
        #: the ends of those of them whose time passes again, as they are in no block whose timer has ended
        self._passing: set[int] = set()
        #: these calls, by what equal ones have in common
        self._cancelled: defaultdict[str, list[Entry]] = defaultdict(list)
        #: the ends of timers that were over, likewise
        self._timers: dict[str, int] = {}
        #: those of cancelled calls that the program has not seen, and of timers that are over
        self._unseen: set[int] = set()
        #: those of calls that the program has cancelled in the instant in which they began
        self._at_once: set[int] = set()
        #: ends that were delivered, and starts, that are in no stored call yet, by the number of the start
        self._unwritten: OrderedDict[int, tuple[Mark, ...]] = OrderedDict()
        self.calls: list[Call] = []
        #: the executions of each call, and what they have made, by the outermost call that has ended
        self._executions: defaultdict[str, list[Entry]] = defaultdict(list)
        self._contained: defaultdict[str, list[Entry]] = defaultdict(list)
        self.mixed_up: str | None = None
        #: all equal calls that ran at the same time, their first start, and whether one of them has started again
        self._mixed_up: set[Entry] = set()
        self._mixed_start, self._is_mixing = math.inf, False
        if calls:
            self._load(calls)
            self._known = self._number

    def _load(self, calls: Sequence[Call]) -> None:
        entries, unplaced = self._placed(calls)
        answers = self._answers(entries, unplaced)
        _number_as_delivered(entries.values())
        known = [entries[start] for start in sorted(entries)] + [entry for entry in answers if not entry.start]
        self._number = max((max(entry.start, entry.end, entry.seen) for entry in entries.values()), default=0)
        self.last_start = max(entries, default=0)
        for entry in sorted(known, key=_START):
            self._executions[entry.call_id].append(entry)
        for entry in answers:
            entry.end = self._next_number()
            if not entry.start:
                self._never_started[entry.end] = entry
        self._expect(self._not_contained(known))

    def _not_contained(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those that no call has made which has ended, and note the others."""
        found: list[Entry] = []
        for entry in entries:
            above = list(callers(entry.call_id)) if entry.start else ()
            ended = [caller for caller in above if _has_ended(self._executions, caller, entry.start)]
            (self._contained[ended[-1]] if ended else found).append(entry)
        return found

    def _expect(self, entries: Sequence[Entry]) -> None:
        """Let starts and ends come in their order again."""
        for entry in entries:
            self._expected[entry.call_id].append(entry)
            if entry.stored is not None:
                self.calls.append(entry.stored)
                self._ended[_kind_of(entry.call_id, entry.stored.name)][entry] = None
        ended = sorted((entry for entry in entries if entry.stored is not None), key=lambda entry: entry.end)
        self._note_times(ended)
        for entry in ended:
            self._ends[entry.end] = Mark(entry.call_id, entry.start, entry.seen or entry.end)
            if _name_of(entry.call_id) == TIMER and entry.stored is not None and entry.stored.error is None:
                self._timers[numbered(entry.call_id)[0]] = entry.end
        self._ends = dict(sorted(self._ends.items()))
        self._place_starts([entry.start for entry in entries if entry.start], ended)
        self._unsure = min([self._unsure, *(entry.end for entry in ended if entry.is_overtaken)])
        groups = _equal_at_the_same_time(entries)
        self._mixed_up |= (mixed_up := {entry for group in groups for entry in group})
        self._mixed_start = min([self._mixed_start, *(entry.start for entry in mixed_up)])
        names = (_name_of(group[0].call_id) for group in groups if not _all_alike(group))
        self.mixed_up = self.mixed_up or next((name for name in names if name != SLEEP), None)

    def _note_times(self, ended: Sequence[Entry]) -> None:
        """Let each end take no longer than a later one: the execution that stored that may have skipped time before."""
        least_s = math.inf
        for entry in reversed(ended):
            assert entry.stored is not None
            if (place := entry.stored.place) is None or entry.is_late or (place.late_s and not place.is_cancelled):
                continue  # a late result takes no time
            self._end_s[entry.end] = least_s = min(least_s, place.end_s)

    def _place_starts(self, starts: Iterable[int], ended: Iterable[Entry]) -> None:
        """Let *starts* come after the ends before them, also if an execution has delivered those after its own starts.

        These have higher numbers, and come before such an end.
        """
        later = deque(entry for entry in ended if entry.seen > entry.end and entry.since)
        last: dict[int, int] = {}  # the number of the last delivery of an execution
        for start in sorted(starts):
            while later and later[0].end < start:
                entry = later.popleft()
                last[entry.since] = max(last.get(entry.since, 0), entry.seen)
            self._missing[start] = max([start, *(seen for since, seen in last.items() if start <= since)])
        self._missing = dict(sorted(self._missing.items(), key=lambda each: each[1]))

    def _placed(self, calls: Iterable[Call]) -> tuple[dict[int, Entry], list[Call]]:
        """Return what has started, by the number of its start, and the calls without a place."""
        entries, unplaced = dict[int, Entry](), list[Call]()
        for call in calls:
            if (place := call.place) is None:
                unplaced.append(call)
                continue
            for mark in (*place.also, Mark(call.call_id, place.start, place.end)):
                entry = entries.setdefault(mark.start, Entry(mark.call_id, mark.start))
                if entry.call_id != mark.call_id:
                    continue
                if mark.start == place.start and entry.stored is None:
                    entry.end, entry.seen = mark.end, max(entry.end, entry.seen)  # another call was stored first
                elif mark.start == place.start:
                    entry.end, entry.is_overtaken = max(mark.end, entry.end), False
                elif mark.end == OVERTAKEN:
                    entry.is_overtaken = True
                elif entry.stored is None and not entry.end:
                    entry.end, entry.since = mark.end, mark.since
                elif mark.end > entry.seen:  # it was stored before, and delivered then
                    entry.seen, entry.since = mark.end, mark.since
            entry, returned = entries[place.start], entries[place.start].stored
            if entry.call_id != call.call_id:  # two processes have executed the step at the same time
                unplaced.append(replace(call, place=None))
            elif returned is None:
                entry.stored = call
            elif call.is_cancelled or returned.is_cancelled:  # after it had returned, or it was executed again
                usage = added(returned.usage, call.usage)
                entry.stored = replace(call, usage=usage, model=call.model or returned.model)
                if returned.error is None and call.kind != "sleep":
                    self._late[call.call_id].append(replace(returned, usage=None, model=None))
                if returned.error is not None and not returned.is_cancelled:
                    entry.failure = returned
        for entry in entries.values():
            if 0 < entry.seen < entry.end:  # that is of an answer or a result that the program has not seen
                entry.seen = entry.since = 0
        if self._late:
            self._drop_taken(calls)
        return entries, unplaced

    def _drop_taken(self, calls: Iterable[Call]) -> None:
        """Drop late results of tools that another call has got; see ``late_of_tool``."""
        owners: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
        for call in calls:
            if call.kind == "tool":
                owners[_execution_of(call)].add(call.call_id)
        for call_id, late in self._late.items():
            self._late[call_id] = deque(call for call in late if len(owners[_execution_of(call)]) < 2)

    def _answers(self, entries: Mapping[int, Entry], unplaced: Iterable[Call]) -> list[Entry]:
        """Give answers and late results to the calls that have got them. Return the others, which wait for their calls.

        Calls that an earlier version has stored are like answers, since they have no place either.
        """
        delivered, open_ = defaultdict[str, deque[Entry]](deque), defaultdict[str, deque[Entry]](deque)
        for entry in sorted(entries.values(), key=lambda entry: entry.end or entry.start):
            if entry.stored is None:
                (delivered if entry.end else open_)[entry.call_id].append(entry)
        for call_id, late in self._late.items():
            while late and delivered[call_id]:
                delivered[call_id].popleft().stored = late.popleft()
        cancelled = Counter(
            entry.call_id for entry in entries.values() if entry.stored is not None and entry.stored.is_cancelled
        )
        answers: list[Entry] = []
        for call in unplaced:
            if delivered[call.call_id]:
                delivered[call.call_id].popleft().stored = call
                continue
            if not open_[call.call_id] and cancelled[call.call_id]:  # it came while its call was cancelled
                cancelled[call.call_id] -= 1
                if call.kind != "sleep":
                    self._late[call.call_id].append(call)
                continue
            entry = open_[call.call_id].popleft() if open_[call.call_id] else Entry(call.call_id)
            entry.stored, entry.is_unseen = call, True
            answers.append(entry)
        return answers

    @property
    def contained(self) -> Sequence[Call]:
        """The calls that others have made which have ended, so that this execution does not make them."""
        return [entry.stored for made in self._contained.values() for entry in made if entry.stored is not None]

    @property
    def not_repeated(self) -> Sequence[Call]:
        """The calls that have ended in an earlier execution, and have not started in this one."""
        return [entry.stored for ended in self._ended.values() for entry in ended if entry.stored is not None]

    def begin(self, call_id: str, arguments: msgspec.Raw) -> Entry:
        """A call starts."""
        if (expected := self._expected.get(call_id)) is None:
            entry = Entry(call_id, stored=self._late_result(call_id, arguments))
        else:
            entry = expected.popleft()
            if not expected:
                del self._expected[call_id]
            if entry.stored is not None:
                of_kind = _kind_of(call_id, entry.stored.name)
                del self._ended[of_kind][entry]
                if not self._ended[of_kind]:
                    del self._ended[of_kind]
            self._missing.pop(entry.start, None)
            self._is_mixing |= entry in self._mixed_up
            self._recur()
        self._never_started.pop(entry.end, None)
        if not entry.start:
            self.last_start = self._new_start = entry.start = self._next_number()
            self._unwritten[entry.start] = (Mark(call_id, entry.start),)
        if entry.is_unseen and entry.end:  # before all later ends, and after all earlier ones, delivered or not
            if entry.end < self._new_end:
                later = [each for end, each in self._never_started.items() if end > entry.end]
                for each in (entry, *later):  # those may start when it is delivered
                    self._renumber(each)
                self._advance()
            self._guessed.add(entry.end)
            self._note_end(entry, entry.end)
        self._begins(entry)
        return entry

    def _begins(self, entry: Entry) -> None:
        entry.start_s, entry.seen_before = self._time() - self._began_at, self._seen_count

    def _renumber(self, entry: Entry) -> None:
        """Number an undelivered answer after all ends of this execution, which may be stored before it is."""
        before, entry.end = entry.end, self._next_number()
        if self._ends.pop(before, None) is not None:
            self._ends[entry.end] = Mark(entry.call_id, entry.start, entry.end)
        if self._never_started.pop(before, None) is not None:
            self._never_started[entry.end] = entry
        timer, _ = numbered(entry.call_id)
        if self._timers.get(timer) == before:
            self._timers[timer] = entry.end

    def has_end(self, call_id: str) -> bool:
        """Whether the next call with this id has ended in an earlier execution."""
        expected = self._expected.get(call_id)
        return bool(expected and expected[0].stored is not None)

    def _late_result(self, call_id: str, arguments: msgspec.Raw) -> Call | None:
        late = self._late.get(call_id)
        if not late or (late[0].kind == "tool" and late[0].arguments != arguments):  # only its position is in its id
            return None
        return late.popleft()

    def late_of_tool(self, call_id: str, name: str, arguments: msgspec.Raw) -> Call | None:
        """Return the late result of an equal call at another place of what the model has said, or None."""
        for id_, late in self._late.items():
            if late and late[0].kind == "tool" and late[0].arguments == arguments:
                if _kind_of(id_, late[0].name) == _kind_of(call_id, name):
                    return late.popleft()
        return None

    def end(self, entry: Entry, *, is_cancelled: bool = False, late_s: float | None = None) -> Place:
        """A call ends in this execution. Return what is stored with it. Then ``turn``; or ``saw``, if cancelled.

        Args:
            late_s: how long ago the program has stopped waiting for it; None if it has not.
        """
        self._new_end = end = self._next_number()
        is_late = late_s is not None and (late_s > AT_ONCE_S or not is_cancelled)
        self._ends[end] = mark = Mark(entry.call_id, entry.start, end)
        self._unwritten.pop(entry.start, None)
        if is_cancelled:
            if not entry.is_known:  # otherwise it had begun, and all that is stored came before the program saw its end
                self._note_if_at_once(entry, end)
            for overtaken in self._returned.values():
                self._note_end(overtaken, OVERTAKEN)
            self._returned.clear()
        else:
            entry.end, self._returned[end] = end, mark
        self._note_delay()
        return Place(
            start=entry.start,
            end=end,
            start_s=round(entry.start_s, 3),
            end_s=math.floor((self._time() - self._began_at) * 1000) / 1000,
            is_cancelled=is_cancelled,
            late_s=max(AT_ONCE_S, round(late_s or 0.0, 3)) if is_late else 0.0,
            vain_s=round(self._vain_s + self._new_vain_s, 3),
            also=tuple(self._take_unwritten()),
        )

    def _take_unwritten(self) -> Iterator[Mark]:
        """Yield what is stored with the next call: first the ends, which are few."""
        size = 0
        while self._unwritten:
            start, marks = next(iter(self._unwritten.items()))
            size += sum(len(mark.call_id) + MARK_BYTES for mark in marks)
            if size > MAX_MARK_BYTES:
                break
            del self._unwritten[start]
            yield from marks

    def saw(self, entry: Entry, end: int) -> None:
        """The program sees an end now. If the step runs again, what has started by now starts before that."""
        seen = self._seen(end)
        stored = self._stored_as(entry, end)
        self._ends.pop(end, None)
        self._returned.pop(end, None)
        if self._new_start > seen or (entry.is_unseen and not entry.end):
            self._note_end(stored, self._next_number())
        self._seen_count, self._saw_at = self._seen_count + 1, self._time()
        self._skipped_s = max(0.0, self._skipped_s + self._left_s(entry))
        if entry.stored is not None:
            self._seen_in, self._seen_end_s = current_task(), self._end_s.get(entry.end, math.inf)
            self._recur()
        else:
            self._advance()

    def _stored_as(self, entry: Entry, end: int) -> Entry | Mark:
        """Return what an end is stored with: of equal calls that are cancelled again, it may be another one."""
        mark = self._ends.get(end)
        return entry if mark is None or not mark.start else mark

    def _note_delay(self) -> None:
        """Let the next call be stored with it if calls have started since the end that comes next.

        If the process dies before that is delivered, they still start before it when the step runs again.
        """
        after = next(iter(self._ends.values()))
        if after.start and self._new_start > max(after.end, self._delayed):
            self._note_end(after, self._next_number())
            self._delayed = self._number

    def _note_end(self, entry: Entry | Mark, end: int) -> None:
        """Let the next call be stored with an end, or with when it was delivered, before the starts."""
        ends = (mark for mark in self._unwritten.get(entry.start, ()) if mark.end)
        self._unwritten[entry.start] = (*ends, Mark(entry.call_id, entry.start, end, self._known))
        self._unwritten.move_to_end(entry.start, last=False)

    def forget(self, entry: Entry) -> None:
        """The end of a call is not stored, so it is not known that it has started."""
        self._unwritten.pop(entry.start, None)
        self._ends.pop(entry.end, None)
        self._returned.pop(entry.end, None)
        self._advance()

    def keep_late(self, call: Call) -> None:
        """The program has stopped waiting for the result of *call*."""
        self._late[call.call_id].append(call)

    async def turn(self, entry: Entry, *, is_last: bool, has_waited: bool = False) -> None:
        """Wait until it is the turn of an end. If other calls were open meanwhile, tasks see it alone.

        Limits of calls that contain it do not pass meanwhile, unless one of them has to cancel another call first.

        Args:
            is_last: no other call is open now.
            has_waited: the time of the call does not count for these limits.
        """
        end = entry.end or self._next_number()  # one that came too late has none
        if _name_of(entry.call_id) == TIMER:
            self._unseen.add(end)
        try:
            if (has_waited or entry.stored is not None) and not self._is_turn(end):
                with clocks_stopped(counts=not has_waited), self._holding(end):
                    while not (self._is_turn(end) or self._is_cancellation_next):
                        await self._wait_for_turn(end)
            while not self._is_turn(end):
                await self._wait_for_turn(end)
            # While a time-out passes again, what was in time takes its time again, so that it stays in time.
            while self._passing & self._to_cancel.keys() and (left_s := self._left_s(entry)) > 0:
                with clocks_stopped(counts=not has_waited), anyio.move_on_after(left_s):
                    await self._recurred.wait()
            if not is_last or self._seen_count > entry.seen_before:
                is_asyncio = current_task() is not None
                for _ in range(CHECKPOINTS):
                    await (asyncio.sleep(0) if is_asyncio else anyio.lowlevel.checkpoint())  # the first takes less
            elif entry.stored is not None:
                await anyio.lowlevel.checkpoint()
        finally:
            self._unseen.discard(end)
            self.saw(entry, end)

    @contextlib.contextmanager
    def _holding(self, end: int) -> Iterator[None]:
        self._held.add(end)
        try:
            yield
        finally:
            self._held.discard(end)

    @property
    def _is_cancellation_next(self) -> bool:
        """Whether the program has to cancel a call before anything else ends."""
        return next(iter(self._ends), 0) in self._to_cancel

    @property
    def has_guesses(self) -> bool:
        """Whether answers are to be delivered of which no earlier execution has stored when they were."""
        return bool(self._never_started or self._guessed & self._ends.keys())

    async def settle(self) -> None:
        """Wait until the program has seen all that has ended by now, and has had time to leave a block."""
        end = self._next_number()
        self._ends[end] = Mark("", 0, end)
        self._unseen.add(end)
        try:
            while not self._is_turn(end):
                await self._wait_for_turn(end)
            for _ in range(SETTLING):
                await anyio.lowlevel.checkpoint()
        finally:
            self._unseen.discard(end)
            self._ends.pop(end, None)
            self._advance()

    def _left_s(self, entry: Entry) -> float:
        """Return for how long a stored call had not ended yet, this long after the end that was delivered last."""
        end_s = self._end_s.get(entry.end)
        return 0.0 if end_s is None else end_s - self._skipped_s - (self._time() - self._began_at)

    def late_s(self, entry: Entry) -> float:
        """Return for how long a call that is cancelled again ran on: no longer than until it would have ended.

        It is less if the execution that stored it had skipped time after its start.
        """
        lasted_s = self._time() - self._began_at - entry.start_s
        return min(entry.place.late_s, max(0.0, entry.place.end_s - entry.place.start_s - lasted_s))

    async def until_cancelled(self, entry: Entry, timers: Iterable[str]) -> None:
        """Wait until the program cancels a call again, for as long as it took before. Returns if it does not.

        Then ``cancelled_again``, in both cases.

        Args:
            timers: those of the blocks around it. What they have cancelled needs no time to pass again.
        """
        key, _ = numbered(entry.call_id)
        if passes_again := all(self._timers.get(timer, math.inf) > entry.end for timer in timers):
            self._passing.add(entry.end)
        self._cancelled[key].append(entry)
        new_start = self._new_start
        self._to_cancel[entry.end] = self._time() + self._left_s(entry) + self._grace_s / 5
        self._advance()
        try:
            while await self._is_in_vain(lambda: self._sound_s(entry.place), lambda: False) and self._deliver_guessed():
                pass
            await self._let_earlier_ones_go_on(entry)
            self._gave_up_at = self._time()
            if entry.is_shifted and self._new_start > new_start:  # another time-out may have passed first
                self._doubt(entry.start)
        except anyio.get_cancelled_exc_class():
            # Of equal calls, any other one may have been cancelled first, since only their arrival tells them apart.
            first = min(self._cancelled[key], key=lambda each: each.end)
            entry.end, entry.stored, first.end, first.stored = first.end, first.stored, entry.end, entry.stored
            # While a thread ran on, a time-out may have passed whose time was skipped, or that took its time before.
            is_unsure = entry.place.late_s > 0 and (not passes_again or self._is_early(entry.place))
            if passes_again and entry.is_shifted:
                is_unsure |= self._time() > self._saw_at + AT_ONCE_S
            if is_unsure:
                self._doubt(entry.start)
                # Nor is the next execution sure of what comes now.
                self._note_end(self._stored_as(entry, entry.end), OVERTAKEN)
            raise
        finally:
            self._cancelled[key].remove(entry)

    def _is_early(self, place: Place) -> bool:
        """Whether a call is cancelled again earlier in its step than before."""
        return self._time() - self._began_at + AT_ONCE_S < place.end_s - place.late_s

    async def _let_earlier_ones_go_on(self, entry: Entry) -> None:
        """Let calls that have waited in vain go on in the order of their ends: the program may then cancel the next."""
        last = 0
        while last < (first := min(self._to_cancel)) < entry.end:
            last = first
            for _ in range(SETTLING):
                await anyio.lowlevel.checkpoint()

    def _sound_s(self, place: Place) -> float:
        """Return the step time of an end, less what was waited in vain both before it and in this execution.

        Otherwise each such wait would have those before it in it, and they would double.
        """
        return place.end_s - min(place.vain_s, self._vain_s)

    @property
    def _new_vain_s(self) -> float:
        return max(0.0, self._gave_up_at - self._recurred_at)

    def _deliver_guessed(self) -> bool:
        """Let answers come first whose place is a guess, as a call waits in vain to be cancelled. False if none is.

        The program may have cancelled the call because of one, if what was stored with its place is lost.
        """
        if answers := sorted(self._guessed & self._ends.keys()):
            seen = self._seen(next(iter(self._ends)))  # nor do they wait for starts that come after that
            moved = [(end, self._ends.pop(end)) for end in answers]
            self._ends = {end: replace(mark, end=min(mark.end, seen)) for end, mark in moved} | self._ends
            self._guessed.clear()
            self._recur()
        return bool(answers)

    def _doubt(self, start: int) -> None:
        """A plain time-out has passed, and one execution has skipped time before it: another one may pass first now."""
        self._is_mixing, self._mixed_start = True, min(start, self._mixed_start)

    def is_cancelled_alone(self, entry: Entry) -> bool:
        """A call is cancelled again. Whether the program sees it at once: none waits for the same."""
        self._to_cancel.pop(entry.end, None)
        self._note_if_at_once(entry, entry.end)
        return not self._to_cancel and self.is_alone(entry.end)

    def _note_if_at_once(self, entry: Entry, end: int) -> None:
        was_later = next(iter(self._missing), math.inf) < entry.start  # so it had not begun when that started
        if was_later and self._time() - self._began_at <= entry.start_s + AT_ONCE_S:
            self._at_once.add(end)

    def is_alone(self, end: int) -> bool:
        """Whether the program sees a cancellation alone: nothing has ended before it, not even a moment ago."""
        return self.may_see(end) and self._time() > self._saw_at + AT_ONCE_S

    def may_see(self, end: int) -> bool:
        """Whether the program may see a cancellation: after all that has ended before, as while a thread ran on.

        It does not wait long for a call that waits to be cancelled itself, perhaps when the program has seen this. Nor
        does it if that waits for a start, and the call has just begun, since it may not have begun at all before.
        """
        if (until := self._waits_until(end)) is not None:
            return self._time() >= until
        return next(iter(self._ends), end) >= end and not self._is_missing_before(end)

    def _waits_until(self, end: int) -> float | None:
        """Return until when a cancellation waits for what ends before; None if for as long as it takes."""
        first = next(iter(self._ends), end)
        return -math.inf if end in self._at_once and self._is_missing_before(first) else self._to_cancel.get(first)

    async def until_it_may_see(self, end: int) -> None:
        self._unseen.add(end)
        seen_count, came_at = -1, self._time()
        try:
            while not self.may_see(end) or seen_count != self._seen_count:
                while not self.may_see(end):
                    until = self._waits_until(end)
                    with anyio.move_on_after(None if until is None else until - self._time()):
                        await self._wait_for_turn(end)
                seen_count = self._seen_count
                for _ in range(CHECKPOINTS):  # for those that are cancelled now, and what the end before has caused
                    await anyio.lowlevel.checkpoint()
            if self._time() > came_at + AT_ONCE_S:  # another time-out may have passed meanwhile
                self._doubt(end)
                if (mark := self._ends.get(end)) is not None:
                    self._note_end(mark, OVERTAKEN)
        finally:
            self._unseen.discard(end)

    def cancelled_again(self, entry: Entry) -> None:
        self._to_cancel.pop(entry.end, None)
        self.saw(entry, entry.end)

    def has_another(self, entry: Entry) -> bool:
        """Whether another execution of a call is known, or what it had returned later."""
        return entry.call_id in self._expected or bool(self._late.get(entry.call_id))

    def reopen(self, entry: Entry) -> Sequence[Entry]:
        """Let a call that the program does not cancel again go on. Return the calls that it had made: they are kept."""
        ended, entry.stored = entry.stored, None
        if not (made := self._not_contained(self._contained.pop(entry.call_id, ()))):
            entry.stored = ended
            return ()
        for each in made:
            if each.stored is not None and ended is not None and each.end < entry.end:  # it has their usage
                each.stored = replace(each.stored, usage=None, model=None)
        entry.end = entry.seen = 0
        self._begins(entry)
        self._expect(made)
        self._recur()
        return made

    async def replaced_by(self, call_id: str, name: str) -> Call | None:
        """Return a call that a new one seems to replace, since the program was changed; None if there is none.

        It has ended, and has the same name and parent as the new one, but other arguments. It does not start again,
        even if this method waits for as long as that took before.
        """
        kind = _kind_of(call_id, name)
        while (entry := self._first_ended(kind)) is not None and self._is_sure_of(entry):
            is_over = functools.partial(self._is_not_awaited, kind, entry)
            if await self._is_in_vain(functools.partial(_start_s, entry), is_over):
                return entry.stored
        return None

    def _is_sure_of(self, entry: Entry) -> bool:
        """Whether an unchanged program surely makes a call again.

        The call may have followed a plain time-out, and not the end before it, if that was earlier and in another task:
        those of ``asyncio.as_completed`` go on after a time-out.
        """
        follows_end = self._seen_in is current_task() or _start_s(entry) <= self._seen_end_s + SKIPPED_S
        return follows_end and self.is_sure(entry.start)

    def _first_ended(self, kind: tuple[str, str]) -> Entry | None:
        """Return the first that has returned or raised. A time-out may pass before a cancelled one starts again."""
        ended = self._ended.get(kind, ())
        return next((entry for entry in ended if entry.stored is not None and not entry.stored.is_cancelled), None)

    def _is_not_awaited(self, kind: tuple[str, str], entry: Entry) -> bool:
        return entry not in self._ended.get(kind, ()) or not self.is_sure(entry.start)

    def is_sure(self, number: int) -> bool:
        """Whether an unchanged program surely repeats what had a number; 0 is that of an answer without a start.

        An unchanged program may go on in any way once equal calls that may be mixed up have started again, but it
        still repeats what came before the first of them. Nor is known what it had seen before its process died.
        """
        return number < self._unsure and (not self._is_mixing or 0 < number < self._mixed_start)

    async def _is_in_vain(self, step_s: Callable[[], float], is_over: Callable[[], bool]) -> bool:
        """Wait until *is_over*. Returns True if it is not, and nothing has recurred for *step_s* and the grace."""
        while not is_over():
            left_s = self._recurred_at + step_s() + self._grace_s - self._time()
            if left_s <= 0:
                return True
            with anyio.move_on_after(left_s):
                await self._recurred.wait()
        return False

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _recur(self) -> None:
        """Something of an earlier execution happens again."""
        self._vain_s += self._new_vain_s
        self._recurred_at = self._time()
        self._recurred.notify()
        self._advance()

    def _advance(self) -> None:
        """Wake the call whose turn it is now."""
        end = next(iter(self._ends), 0)
        if (turn := self._turns.get(end)) is not None and self._is_turn(end):
            turn.set()
        for end in self._unseen:
            if end in self._turns and self.may_see(end):
                self._turns[end].set()
        if self._is_cancellation_next:  # they do not wait long for it
            for end in (self._held | self._unseen) & self._turns.keys():
                self._turns[end].set()

    def _is_turn(self, end: int) -> bool:
        if end not in self._ends:
            return True
        return next(iter(self._ends)) == end and not self._is_missing_before(end)

    def _is_missing_before(self, end: int) -> bool:
        return bool(self._missing) and next(iter(self._missing.values())) < self._seen(end)

    def _seen(self, end: int) -> int:
        """Return the number of when an end was delivered before."""
        return self._ends[end].end if end in self._ends else end

    async def _wait_for_turn(self, end: int) -> None:
        """Wait until it may be the turn of *end*. If nothing recurs, strike out what was waited for in vain."""
        turn = self._turns[end] = anyio.Event()
        try:
            if not (self._missing or self._ended):  # all that has begun before has begun again, and so will end
                await turn.wait()
                return
            since = max(self._recurred_at, self._struck_at)
            with anyio.move_on_after(since + self._grace_s - self._time()):
                await turn.wait()
                return
            if since == max(self._recurred_at, self._struck_at):
                self._strike_out(min(self._turns))
        finally:
            del self._turns[end]

    def _strike_out(self, end: int) -> None:
        """Let what comes before *end* hold up no other, apart from calls that wait to be cancelled."""
        self._struck_at = self._time()
        for number in [number for number, place in self._missing.items() if place < self._seen(end)]:
            del self._missing[number]
            if self._unseen:  # a time-out may pass that had not, or another one may have passed meanwhile
                self._doubt(min(number, *self._unseen))
        for number in [number for number in self._ends if number < end and number not in self._to_cancel]:
            mark = self._ends.pop(number)
            if self._unseen and mark.start:
                self._note_end(mark, OVERTAKEN)
        self._advance()


_START = operator.attrgetter("start")


def _number_as_delivered(entries: Iterable[Entry]) -> None:
    """Let an end come after those that were stored later, if an execution has delivered it after them.

    Such as a call that waited to be cancelled again, until the program had seen a late result. It is unknown when an
    answer was delivered: its number is that of its place.
    """
    executions: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.since and entry.stored is not None and entry.stored.place is not None:
            executions[entry.since].append(entry)
    for delivered in executions.values():
        last = 0
        for entry in sorted(delivered, key=lambda entry: entry.seen or entry.end):
            if entry.end < last:
                entry.end = entry.seen or entry.end
            last = max(last, entry.end)


def _has_ended(executions: Mapping[str, Sequence[Entry]], caller: str, start: int) -> bool:
    """Whether the call has ended that has made another one with *start*, perhaps by a task that it has left running."""
    if not (made := executions.get(caller)):
        return False
    index = bisect.bisect_left(made, start, key=_START)
    return made[max(0, index - 1)].stored is not None  # if none is before it, that number was lost with a process


def callers(call_id: str) -> Iterator[str]:
    """Yield the ids of the calls that contain a call, from the inside out."""
    while call_id := parent_of(call_id):
        yield call_id


def numbered(call_id: str) -> tuple[str, int]:
    """Split an id into what equal calls of one parent have in common, and their number."""
    _, _, *number = call_id.rpartition(NESTED)[2].split(":")
    return (call_id.rpartition(":")[0], int(number[0])) if number else (call_id, 1)


def parent_of(call_id: str) -> str:
    """Return the id of the call that has made a call, or ""."""
    return call_id.rpartition(NESTED)[0]


def _kind_of(call_id: str, name: str) -> tuple[str, str]:
    return parent_of(call_id), name


def _execution_of(call: Call) -> tuple[object, ...]:
    """Return what only calls have in common that have the result of one execution."""
    return parent_of(call.call_id), call.kind, call.name, bytes(call.arguments), call.started_at


def _start_s(entry: Entry) -> float:
    """Return when a call started that is stored; see ``Place``."""
    return 0.0 if entry.stored is None or entry.stored.place is None else entry.stored.place.start_s


def _name_of(call_id: str) -> str:
    return call_id.rpartition(NESTED)[2].partition(":")[0]


def _equal_at_the_same_time(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Return the equal calls that ran at the same time, directly or through others, by their first start."""
    groups, together, last = list[list[Entry]](), dict[str, list[Entry]](), dict[str, float]()
    for entry in sorted(entries, key=lambda entry: entry.start):
        if not entry.start or _name_of(entry.call_id) in (TIMEOUT, TIMER):  # their times are in their ids
            continue
        key, _ = numbered(entry.call_id)
        if entry.start >= last.get(key, 0):
            groups.append(group := list[Entry]())
            together[key], last[key] = group, 0
        together[key].append(entry)
        last[key] = max(last[key], entry.seen or entry.end or math.inf)
    return [group for group in groups if len(group) > 1]


def _all_alike(group: Sequence[Entry]) -> bool:
    """Whether it does not matter which of these equal calls gets which of their results."""
    calls = [entry.stored for entry in group]
    ends = [None if call is None else (call.result, call.error, call.is_cancelled) for call in calls]
    return all(end == ends[0] for end in ends)

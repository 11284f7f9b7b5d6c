"""A plain interpreter of workflow programs, without an engine and a journal: it says what must come out of a program.

It calculates with times. Where a program can go on in several ways, such as with the part that has ended first, it goes
the way that the times tell, or one that it is given.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from tests.proof.workflows import CALLS, FAILED_BEFORE, Statement, total

__all__ = ["Expected", "interpret"]

FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 8.0


class Expected(NamedTuple):
    """What comes out: the value, or "raised …"; how often each side effect begins, and each decision, by its place."""

    outcome: Any
    begun: Counter[str]
    decisions: dict[str, Any]


class Event(NamedTuple):
    """A side effect begins, or, with a decision, the program goes on."""

    time_s: float
    at: str
    decision: Any = None


@dataclass
class Course:
    """What a statement does from its start to its end.

    Attributes:
        failed_s: since when a group has failed that waits for its other tasks.
        threads: when each function in a thread begins and ends. A program that cancels it waits for its end.
        left: what goes on when the statement ends or is cancelled, each with the time from which on it does.
    """

    ends_s: float
    value: Any = None
    error: str | None = None
    failed_s: float = inf
    events: list[Event] = field(default_factory=list)
    threads: list[tuple[float, float]] = field(default_factory=list)
    left: "list[tuple[float, Course]]" = field(default_factory=list)

    def add(self, part: "Course") -> None:
        """Add what *part* does, while this one waits for it or beside it."""
        self.events += part.events
        self.threads += part.threads
        self.left += part.left

    def then(self, part: "Course") -> Any:
        """Go on with *part* to its end. Return its value."""
        self.add(part)
        self.ends_s, self.error, self.failed_s = part.ends_s, part.error, part.failed_s
        return part.value

    def until(self, time_s: float) -> "Course":
        """Return the same, cancelled at a time unless it has ended."""
        if self.ends_s <= time_s:
            return self
        running = [end for begin, end in self.threads if begin <= time_s < end]
        cut = Course(max([time_s, *running]), events=[each for each in self.events if each.time_s <= time_s])
        cut.threads = [each for each in self.threads if each[0] <= time_s]
        for since_s, course in self.left:
            if since_s <= time_s:
                cut.left.append((since_s, course))
            else:
                cut.add(part := course.until(time_s))
                cut.ends_s = max(cut.ends_s, part.ends_s)
        return cut


def interpret(program: Statement, decisions: Mapping[str, Any] | None = None) -> Expected:
    """Return what must come out of *program*.

    Args:
        decisions: by place, those that a real execution has taken. Its times then mean nothing.
    """
    whole = _Interpreter(decisions or {}).course(program, "0", 0.0)
    left, events = [course for _, course in whole.left], whole.events
    while left:
        course = left.pop()
        events += [each for each in course.events if each.time_s <= whole.ends_s]  # the step ends it
        left += [each for _, each in course.left]
    begun = Counter(each.at for each in events if each.decision is None)
    taken = {each.at: each.decision for each in events if each.decision is not None}
    return Expected(whole.value if whole.error is None else f"raised {whole.error}", begun, taken)


class _Interpreter(NamedTuple):
    decisions: Mapping[str, Any]

    def course(self, s: Statement, at: str, start_s: float) -> Course:
        if s.kind in CALLS:
            return self._effect(s, at, start_s)
        parts: dict[str, Any] = {"seq": self._seq, "loop": self._seq, "try": self._try, "case": self._case}
        parts |= {"gather": self._all, "group": self._all, "first": self._some, "wait": self._some}
        parts |= {
            "tool": self._in_time,
            "timeout": self._in_time,
            "deadline": self._in_time,
            "completed": self._in_order,
            "model": self._model,
        }
        if s.kind == "agent":
            return self.course(s.parts[0], f"{at}.0", start_s)
        if s.kind in parts:
            course: Course = parts[s.kind](s, at, start_s)
            return course
        if s.kind == "receive":
            return self._receive(s, at, start_s)
        return Course(start_s + s.seconds, s.n if s.kind == "ask" else 0)

    def _receive(self, s: Statement, at: str, start_s: float) -> Course:
        found = Course(start_s + s.seconds if s.comes == "never" else start_s, 0 if s.comes == "never" else s.n)
        if s.seconds:
            found.value = self._decide(found, at, found.value)
        return found

    def _effect(self, s: Statement, at: str, start_s: float) -> Course:
        found, pause_s = Course(start_s), FIRST_PAUSE_S
        for tries in range(s.retries + 1):
            if tries:
                found.ends_s, pause_s = found.ends_s + pause_s, min(2 * pause_s, MAX_PAUSE_S)
            begin_s = found.ends_s
            found.events.append(Event(begin_s, at))
            fails = s.kind in ("fail", "mended", "block_and_fail") or (s.kind == "flaky" and not tries)
            found.value, found.error = s.n, f"Oops({s.n})" if fails else None
            found.ends_s += s.seconds
            if s.kind.startswith("block"):
                found.threads.append((begin_s, found.ends_s))
            elif s.limit_s is not None and s.limit_s < s.seconds:
                found.ends_s, found.error = begin_s + s.limit_s, "TimeoutError"
            if found.error is None:
                break
        if s.limit_s is not None or s.is_once or s.kind == "mended":
            decision = self._decide(found, at, found.error or "in time")
            found.error = None if decision == "in time" else decision
        return found

    def _parts(self, s: Statement, at: str, start_s: float) -> list[Course]:
        return [self.course(part, f"{at}.{i}", start_s) for i, part in enumerate(s.parts)]

    def _decide(self, found: Course, at: str, decision: Any) -> Any:
        """Note a decision at the end of a course, and return it, or the one that is given."""
        found.events.append(Event(found.ends_s, at, decision))
        return self.decisions.get(at, decision)

    def _seq(self, s: Statement, at: str, start_s: float) -> Course:
        found, values = Course(start_s), list[Any]()
        for i in range(s.times or len(s.parts)):
            values.append(found.then(self.course(s.parts[0 if s.times else i], f"{at}.{i}", found.ends_s)))
            if found.error is not None:
                return found
        found.value = values
        return found

    def _try(self, s: Statement, at: str, start_s: float) -> Course:
        found = Course(start_s)
        found.value = found.then(self.course(s.parts[0], f"{at}.0", start_s))
        if found.error is not None:
            found.value = found.then(self.course(s.parts[1], f"{at}.1", found.ends_s))
        return found

    def _case(self, s: Statement, at: str, start_s: float) -> Course:
        found = Course(start_s)
        tested = found.then(self.course(s.parts[0], f"{at}.0", start_s))
        if found.error is None:
            chosen = 1 + total(tested) % (len(s.parts) - 1)
            found.value = found.then(self.course(s.parts[chosen], f"{at}.{chosen}", found.ends_s))
        return found

    def _in_time(self, s: Statement, at: str, start_s: float) -> Course:
        body, over_s = self.course(s.parts[0], f"{at}.0", start_s), start_s + (s.limit_s or inf)
        has_failed = s.kind == "timeout" and body.failed_s < over_s
        is_over = self.decisions.get(at, body.ends_s > over_s and (FAILED_BEFORE if has_failed else True))
        found = body.until(over_s) if is_over else body
        if is_over:
            found.error = body.error if is_over == FAILED_BEFORE else "TimeoutError"
        found.events.append(Event(found.ends_s, at, is_over))
        return found

    def _all(self, s: Statement, at: str, start_s: float) -> Course:
        parts = self._parts(s, at, start_s)
        failing = [i for i in sorted(range(len(parts)), key=lambda i: parts[i].ends_s) if parts[i].error][:1]
        if not failing:
            found = Course(max(part.ends_s for part in parts), [part.value for part in parts])
            for part in parts:
                found.add(part)
            self._decide(found, at, [])
            return found
        ends_s = parts[failing[0]].ends_s
        found = Course(ends_s, failed_s=ends_s if s.kind == "group" else inf)
        for part in parts:
            if s.kind == "group":
                found.add(cut := part.until(ends_s))
                found.ends_s = max(found.ends_s, cut.ends_s)
            else:
                found.left.append((ends_s, part))
        failed = self._decide(found, at, failing)
        error = ", ".join(parts[i].error or "" for i in failed)
        found.error = f"ExceptionGroup({error})" if s.kind == "group" else error
        return found

    def _model(self, s: Statement, at: str, start_s: float) -> Course:
        """It reads what its tools return, and that they have failed."""
        parts = self._parts(s, at, start_s)
        found = Course(max(part.ends_s for part in parts), sum(total(part.value) for part in parts if not part.error))
        for part in parts:
            found.add(part)
        return found

    def _some(self, s: Statement, at: str, start_s: float) -> Course:
        parts = self._parts(s, at, start_s)
        ends = [part.ends_s for part in parts]
        ends_s = min(ends) if s.kind == "first" else min(max(ends), start_s + (s.limit_s or 0.0))
        found = Course(ends_s)
        for part in parts:
            found.add(cut := part.until(ends_s))
            found.ends_s = max(found.ends_s, cut.ends_s)
        done = [parts[i] for i in self._decide(found, at, [i for i, end_s in enumerate(ends) if end_s <= ends_s])]
        found.value, found.error = (
            [part.value for part in done],
            next((part.error for part in done if part.error), None),
        )
        return found

    def _in_order(self, s: Statement, at: str, start_s: float) -> Course:
        parts = self._parts(s, at, start_s)
        order = sorted(range(len(parts)), key=lambda i: parts[i].ends_s)
        order = order[: next((place for place, i in enumerate(order, 1) if parts[i].error), len(order))]
        found = Course(parts[order[-1]].ends_s, left=[(start_s, part) for part in parts])
        last = parts[(order := self._decide(found, at, order))[-1]]
        found.value, found.error = [parts[i].value for i in order], last.error
        return found

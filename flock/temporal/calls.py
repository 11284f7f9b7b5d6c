"""The finished calls and the messages that a workflow has received, and which reports of workers count."""

from collections.abc import Callable, Iterable
from datetime import datetime

import msgspec
from msgspec.structs import replace

from flock.agents.questions import MESSAGE, check_answer
from flock.errors import InvalidData
from flock.runs import Call, Question, Usage
from flock.steps.answers import answer_of, dropped_of, end_of_expired, is_expired
from flock.steps.identity import asking_call
from flock.temporal.messages import Asked, CallDone, CallsPage, Execution, Report, Sent, Waits, latest

#: Calls of about this size, in bytes, are returned at once. The cluster returns at most 2 MiB, and warns before that.
MAX_PAGE_BYTES = 400_000


class Fence:
    """Which reports count: those of the last execution of each step, and what earlier ones had reported before.

    Args:
        generation: those of chunks with an earlier one do not count.
    """

    def __init__(self, generation: int = 0) -> None:
        self._generation = generation
        self._last: dict[int, Execution] = {}

    def admits(self, report: Report) -> bool:
        """Whether a report counts. If it does, later ones of earlier executions do not."""
        by = report.by
        if by is None:
            return True
        if by.generation < self._generation or by.is_before(self._last.get(report.item, by)):
            return False
        self._last[report.item] = by
        return True


class Calls:
    """The finished calls, and the messages to runs, that a workflow has received.

    Args:
        on_drop: is called with the call of each message that does not fit.
        generation: see ``Fence``.
    """

    def __init__(
        self,
        calls: Iterable[CallDone] = (),
        messages: Iterable[Sent] = (),
        on_drop: Callable[[Call], object] = lambda call: None,
        generation: int = 0,
    ) -> None:
        self._by_item: dict[int, dict[tuple[int, str], CallDone]] = {}
        #: what each item, or the run, had spent when its last call finished
        self._spent: dict[int, Usage | None] = {}
        #: the waits that steps have begun while they ran, by the step and the call that waits
        self._begun: dict[int, dict[tuple[int, str], Question]] = {}
        self._messages: dict[int, list[Sent]] = {}
        #: of all messages that have been kept, received or not
        self.message_ids: set[str] = set()
        self._on_drop = on_drop
        self.fence = Fence(generation)
        for done in calls:  # they count, whoever has reported them
            self.add(replace(done, by=None))
        for sent in messages:
            self.keep(sent)

    def next_step(self) -> None:
        """Drop the calls of a run, whose step has ended."""
        for kept in (self._by_item, self._spent, self._begun):
            kept.clear()

    def keep(self, sent: Sent) -> None:
        """Keep a message until a step receives it."""
        if sent.id not in self.message_ids:
            self.message_ids.add(sent.id)
            self._messages.setdefault(sent.item, []).append(sent)

    def keep_before(self, messages: Iterable[Sent]) -> None:
        """Keep messages to a run that were sent before all others."""
        later = self._messages.pop(0, [])
        for sent in messages:
            self.keep(sent)
        self._messages.setdefault(0, []).extend(later)

    def messages_to(self, item: int) -> tuple[Sent, ...]:
        """Return the messages that an item, or a run, has not received."""
        return tuple(self._messages.get(item, ()))

    def ask(self, asked: Asked) -> None:
        """Give the next message to the wait of a step that still runs, if there is one."""
        wait = asked.question
        if not self.fence.admits(asked):
            return
        self._begun.setdefault(asked.item, {})[asked.step, asking_call(wait.call_id)] = wait
        if wait.kind == "message" and self.unanswered(asked.item, asked.step, [wait]):
            self._receive(asked.item, asked.step, wait)

    def waits(self, item: int, step: int, call_ids: Iterable[str]) -> Waits:
        """Return what has come for these waits of a step."""
        answered = self._by_item.get(item, {})
        return Waits(
            answers=tuple(answered[step, call_id].call for call_id in call_ids if (step, call_id) in answered),
            messages=frozenset(sent.name for sent in self.messages_to(item)),
        )

    def _receive(self, item: int, step: int, wait: Question) -> None:
        """Give *wait* the next message of its name that fits. Drop those that do not."""
        sent = self._messages.get(item, [])
        for message in [each for each in sent if each.name == wait.question]:
            sent.remove(message)
            try:
                check_answer(wait, message.message, MESSAGE)
            except InvalidData as exc:
                dropped = CallDone(item=item, step=step, call=dropped_of(wait, exc, message.at))
                self._by_item.setdefault(item, {}).setdefault((step, f"{wait.call_id} {message.id}"), dropped)
                self._on_drop(dropped.call)
            else:
                self.add(CallDone(item=item, step=step, call=answer_of(wait, message.message, message.at)))
                return

    def add(self, done: CallDone) -> None:
        """Add a call. Of several answers to a question, the first one counts. A failed call may be made again.

        The end of a call that is executed at most once replaces its start, and the first one counts. A step that
        receives an answer while it runs adds its place.
        """
        self._spent[done.item] = latest(self._spent.get(done.item), done.spent)
        call = done.call
        if self.fence.admits(done) and call.is_checkpoint:
            of_item, call_id = self._by_item.setdefault(done.item, {}), call.call_id
            if call.is_answer:
                if call.place is not None and (given := of_item.get((done.step, call_id))) is not None:
                    of_item[done.step, call_id] = replace(given, call=replace(given.call, place=call.place))
            elif call.once is None and call.place is not None:
                call_id = f"{call_id} {call.place.start} {call.completed_at}"
            elif call.once is None and call.raised is not None and call.kind != "question":
                call_id = f"{call_id} {call.completed_at}"
            known = of_item.setdefault((done.step, call_id), done)
            if call.once == "ended" and known.call.is_start:
                of_item[done.step, call_id] = done

    def of_step(self, item: int, step: int) -> list[Call]:
        return [done.call for done in self.of_item(item) if done.step == step]

    def page(self, item: int, step: int, after: int) -> CallsPage:
        """Return some calls of a step, without the first *after*. No call changes its position."""
        begun = [wait for (begun_in, _), wait in self._begun.get(item, {}).items() if begun_in == step]
        left, page, size = self.of_step(item, step)[after:], list[Call](), 0
        for call in left:
            size += len(msgspec.json.encode(call))
            if page and size > MAX_PAGE_BYTES:
                break
            page.append(call)
        waits, is_last = self.unanswered(item, step, begun), len(page) == len(left)
        return CallsPage(calls=tuple(page), is_last=is_last, spent=self._spent.get(item), waits=waits)

    def still_open(
        self, item: int, step: int, questions: Iterable[Question], at: datetime | None = None
    ) -> tuple[Question, ...]:
        """Return those of *questions* that are not answered. With *at*, expired ones get their default, or raise.

        Messages that were sent become answers too, so it is called when the step waits. A workflow and the readers of
        its history must agree: both call this with the time of each workflow task, after they have added the answers
        that came before it.
        """
        for question in questions:
            if question.kind == "message" and self.unanswered(item, step, [question]):
                self._receive(item, step, question)
            is_late = at is not None and is_expired(question, at) and self.unanswered(item, step, [question])
            if at is not None and is_late and (call := end_of_expired(question, at)) is not None:
                self.add(CallDone(item=item, step=step, call=call))
        return self.unanswered(item, step, questions)

    def unanswered(self, item: int, step: int, questions: Iterable[Question]) -> tuple[Question, ...]:
        """Return those of *questions* that are not answered, also while their step runs again."""
        answered = self._by_item.get(item, {})
        return tuple(question for question in questions if (step, question.call_id) not in answered)

    def has_news(self, item: int, step: int, questions: tuple[Question, ...], at: datetime) -> bool:
        """Whether one of *questions*, which were open, is answered or has expired."""
        left = self.still_open(item, step, questions)
        return left != questions or any(is_expired(question, at) for question in questions)

    def of_item(self, item: int) -> Iterable[CallDone]:
        return self._by_item.get(item, {}).values()

    def discard(self, item: int) -> None:
        for kept in (self._by_item, self._spent, self._begun, self._messages):
            kept.pop(item, None)

    @property
    def size(self) -> int:
        """The length of all calls and messages, as JSON."""
        return sum(len(msgspec.json.encode(each)) for each in (*self.all(), *self.all_messages()))

    def all_messages(self) -> tuple[Sent, ...]:
        return tuple(sent for messages in self._messages.values() for sent in messages)

    def all(self) -> tuple[CallDone, ...]:
        return tuple(done for calls in self._by_item.values() for done in calls.values())

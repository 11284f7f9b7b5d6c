"""The live output of a run: what its agents write in their current steps.

It is not a log. It holds the text that each agent has written so far, and each reader has its own place in that text.
So a slow reader costs nothing, and gets all that was written since its last event in one piece. Nothing is stored.
"""

import asyncio
import contextlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime
from typing import Any

import anyio
import msgspec

from flock.models.pieces import Joiner
from flock.pydanticmodel import to_json
from flock.runs import JSON_NULL, MAX_SHOWN_BYTES, CallKind, Event, RunContext, is_end_of_step, started_id
from flock.scopes import Signal, running_loop
from flock.steps.threads import loop_scheduler

#: After a piece of text, more text wakes the readers only after this time, in seconds: more often than one can read.
PIECE_INTERVAL_S = 1 / 40
#: What one writer counts for the size of a live output, in addition to its text.
WRITER_CHARS = 512
#: How long the live output of a run that has ended is kept for its first reader, in seconds, and of how many such runs.
UNREAD_S = 10.0
MAX_UNREAD_RUNS = 1000


class _RemoteContext(msgspec.Struct, kw_only=True):
    """The context of an agent in another process."""

    run_id: str
    attempt: int
    position: int
    agent_name: str
    call_id: str = ""


Context = RunContext | _RemoteContext


class _Text(io.StringIO):
    """Text that grows. Lone surrogates are replaced, because no event can have them."""

    def __init__(self) -> None:
        super().__init__()
        self._joiner = Joiner()

    def append(self, text: str) -> int:
        """Append *text*, and return by how many characters the whole has grown."""
        self.seek(0, io.SEEK_END)
        return self.write(self._joiner.add(text))


class _Writer:
    """What one agent has written in a step, or in a call of the step.

    Attributes:
        fields: text that grows; or a whole value, with the number of the change that set it, made negative.
        call: the data of ``call.started``; None for a step.
        resets: how many times its text was dropped.
        changed, created: the number of its last change and of its first one, in the live output.
        is_done: its call has ended.
        has_output: it has written a part of its output in this execution, even if that was dropped.
    """

    def __init__(self, context: Context, call_id: str, created: int) -> None:
        self.run_id, self.attempt = context.run_id, context.attempt
        self.position, self.agent_name, self.call_id = context.position, context.agent_name, call_id
        self.call: dict[str, Any] | None = None
        self.created = self.changed = created
        self.resets = 0
        self.is_done = self.has_output = False
        self.clear()

    def clear(self) -> None:
        self.fields: dict[str, _Text | tuple[int, msgspec.Raw]] = {}
        self.reasoning = _Text()
        self.chars = 0

    def set_value(self, field: str, value: msgspec.Raw, change: int) -> None:
        before = self.fields.get(field)
        self.chars += len(value) - (len(before[1]) if isinstance(before, tuple) else 0)
        self.fields[field] = (change, value)

    @property
    def key(self) -> tuple[int, str]:
        return self.position, self.call_id

    @property
    def is_empty(self) -> bool:
        return not self.fields and not self.reasoning.tell()

    def event(self, name: str, /, **data: Any) -> Event:
        of = {"run_id": self.run_id, "attempt": self.attempt, "position": self.position, "agent_name": self.agent_name}
        return Event(id=None, name=name, data={**of, **({"call_id": self.call_id} if self.call_id else {}), **data})


class LiveOutput:
    """What the agents of one run write. Agents write in any thread; readers read in the event loop.

    Args:
        max_chars: max characters that are kept, of one agent and of all calls that have ended. What exceeds it is
            dropped, and an agent's text is corrected at its end.

    Attributes:
        watchers: how many watch the run.
        changed: is notified of each change of the live output, and of the run's record.
        news: how many times the run's record may have changed.
        next_is_late: whether the next reader gets what was written before it as a snapshot. The first one that watched
            the run from its start misses nothing.
        ended_steps: how many steps of the run have ended, with all of their text.
        follower: cancels the task that copies it from another process, or None.
        lost_owner: the engine to which the connection broke.
    """

    follower: anyio.CancelScope | None = None
    lost_owner: str | None = None
    ended_steps = 0

    def __init__(self, max_chars: int) -> None:
        self.watchers = self.news = 0
        self.changed = Signal()
        self.readers: set[LiveReader] = set()
        self.next_is_late = False
        self._max_chars = max_chars
        self._call_soon, self._loop_thread = loop_scheduler(), threading.get_ident()
        self._is_waking = False
        self._loop = running_loop()
        self._next_piece_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._lock = threading.Lock()
        #: in the order of their last change
        self._writers: OrderedDict[tuple[int, str], _Writer] = OrderedDict()
        self._done: OrderedDict[tuple[int, str], _Writer] = OrderedDict()
        self.changes = self._done_chars = 0
        #: what was written last, if that is text
        self._last: _Piece | None = None

    @property
    def chars(self) -> int:
        """Its size in characters, with ``WRITER_CHARS`` for each writer."""
        with self._lock:
            return sum(written.chars + WRITER_CHARS for written in self._writers.values())

    def note_news(self) -> None:
        """Let the readers read the run's record again."""
        self.news += 1
        self.wake()

    def wake(self) -> None:
        """Wake the readers. In the event loop only."""
        self._is_waking = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.changed.notify()

    @property
    def wakes_soon(self) -> bool:
        """Whether the readers will be woken for a piece of text."""
        return self._timer is not None

    def _wake_for_piece(self) -> None:
        """Wake the readers now, or as soon as ``PIECE_INTERVAL_S`` has passed. In the event loop only."""
        if self._loop is None:
            self.wake()
        elif self._loop.time() >= self._next_piece_at:
            self._wake_with_text()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._next_piece_at, self._wake_with_text)

    def _wake_with_text(self) -> None:
        assert self._loop is not None
        self._next_piece_at = self._loop.time() + PIECE_INTERVAL_S
        self.wake()

    # Writing: in any thread

    def write(self, writer: Context, field: str, text: str) -> None:
        with self._lock:  # as ``_writing``, in less time: this is done for each piece
            written = self._writer(writer, writer.call_id)
            written.has_output = True
            content = written.fields.get(field)
            if not isinstance(content, _Text):
                if content is not None:
                    written.resets += 1  # readers would append the text to the value
                content = written.fields[field] = _Text()
            if self._has_room(written, writer) and (chars := content.append(text)):  # so its call has not ended
                written.chars += chars
                if self._last is None or not self._last.grow(written, field, self.changes):
                    self._last = _Piece(written, field, content.tell() - chars, self.changes)
        self._wake_soon(self._wake_for_piece)

    def write_value(self, writer: Context, field: str, value: Any) -> None:
        raw = msgspec.Raw(msgspec.json.encode(value, enc_hook=to_json))
        with self._writing(writer) as written:
            written.has_output = True
            if self._has_room(written, writer):
                written.set_value(field, raw, -self.changes)

    def write_reasoning(self, writer: Context, text: str) -> None:
        with self._writing(writer) as written:
            if self._has_room(written, writer):
                written.chars += written.reasoning.append(text)

    def reset(self, writer: Context) -> None:
        known = self._writers.get((writer.position, writer.call_id))
        if known is not None and not known.is_empty:
            with self._writing(writer) as written:
                written.clear()
                written.resets += 1

    def settle(self, writer: Context, result: msgspec.Raw, *, has_missed: bool) -> None:
        """Complete what *writer* has written, or replace it where it differs from its *result*."""
        known = self._writers.get((writer.position, writer.call_id))
        if not has_missed and (known is None or not (known.has_output or known.resets)):
            return  # no reader has received any of it
        members = msgspec.json.decode(result, type=dict[str, msgspec.Raw])
        values = {name: msgspec.json.decode(member) for name, member in members.items()}
        with self._writing(writer) as written:
            fields = written.fields.items()
            if not all(_may_become(content, values.get(name, msgspec.UNSET)) for name, content in fields):
                written.clear()
                written.resets += 1
            for name, value in values.items():
                content = written.fields.get(name)
                if content is None and isinstance(value, str):
                    content = written.fields[name] = _Text()
                if isinstance(content, _Text):
                    written.chars += content.write(value[content.seek(0, io.SEEK_END) :])
                elif content is None or content[1] != members[name]:
                    written.set_value(name, members[name], -self.changes)

    def _has_room(self, written: _Writer, writer: Context) -> bool:
        if written.is_done:
            return False  # what a call has left behind is not its output
        is_limited = isinstance(writer, _RemoteContext)  # by the other process, which sends the whole text at the end
        return is_limited or written.chars < self._max_chars

    @contextlib.contextmanager
    def _writing(self, writer: Context) -> Iterator[_Writer]:
        """Change what *writer* has written, and wake the readers."""
        with self._lock:
            written = self._writer(writer, writer.call_id)
            before = written.chars
            yield written
            if written.is_done:
                self._done_chars += written.chars - before
        self._wake_soon()

    def _writer(self, context: Context, call_id: str) -> _Writer:
        key = context.position, call_id
        self.changes += 1
        written = self._writers.get(key)
        if written is None:
            written = self._writers[key] = _Writer(context, call_id, self.changes)
        else:
            self._writers.move_to_end(key)
        written.agent_name, written.changed = context.agent_name, self.changes
        written.attempt = max(written.attempt, context.attempt)
        return written

    def _wake_soon(self, wake: Callable[[], None] | None = None) -> None:
        wake = wake or self.wake
        if threading.get_ident() == self._loop_thread:
            wake()
        elif not self._is_waking:  # many changes wake the readers once
            self._is_waking = True
            self._call_soon(wake)

    # The course of the run: in the event loop

    def begin_step(self, context: Context) -> None:
        """Drop what an earlier execution of the same step has written, except in calls that have ended."""
        unread = context.position if self.next_is_late else 0  # the first reader is still to come
        lowest = min((reader.position for reader in self.readers), default=unread)
        with self._lock:
            for written in list(self._writers.values()):
                if written.position < lowest:  # all readers have the end of its step
                    self._forget(written)
            self._restart(context.position, context.attempt)
        self._wake_soon()

    def _restart(self, position: int, attempt: int = 0) -> None:
        for written in list(self._writers.values()):
            if written.position >= position and not written.is_done:
                self.changes += 1
                written.attempt, written.changed = max(written.attempt, attempt), self.changes
                written.call, written.has_output = None, False
                self._writers.move_to_end(written.key)
                if not written.is_empty:
                    written.clear()
                    written.resets += 1

    def end_step(self, position: int) -> None:
        """Note that a step has ended."""
        self.ended_steps = position + 1
        self._wake_soon()

    def begin_call(
        self, context: Context, call_id: str, name: str, kind: CallKind, arguments: msgspec.Raw, started_at: datetime
    ) -> None:
        """Note that a call of the step has started."""
        with self._lock:
            written = self._writer(context, call_id)
            self._count_done(written, False)
            written.attempt, written.created = context.attempt, self.changes
            written.call = {"name": name, "kind": kind, "started_at": started_at}
            if arguments != JSON_NULL and len(arguments) <= MAX_SHOWN_BYTES:
                written.call["arguments"] = arguments
        self._wake_soon()

    def end_call(self, position: int, call_id: str) -> None:
        """Note that a call has ended. Of those, the oldest are forgotten if they take too much room."""
        with self._lock:
            written = self._writers.get((position, call_id))
            if written is not None:
                self._count_done(written, True)
                while self._done_chars > self._max_chars:
                    self._forget(next(iter(self._done.values())))

    def _count_done(self, written: _Writer, is_done: bool) -> None:
        if written.is_done != is_done:
            written.is_done = is_done
            if is_done:
                self._done[written.key] = written
            else:
                del self._done[written.key]
            self._done_chars += (written.chars + WRITER_CHARS) * (1 if is_done else -1)

    def _forget(self, written: _Writer) -> None:
        self._count_done(written, False)
        del self._writers[written.key]
        written.clear()
        written.resets += 1

    # What happens in another process

    def apply(self, name: str, data: dict[str, Any]) -> None:
        """Do what a live event of another process says."""
        context = msgspec.convert(data, _RemoteContext)
        if name in ("output.reset", "output.snapshot"):
            self.reset(context)
        if name == "output.delta":
            self.write(context, data["field"], data["text"])
        elif name == "reasoning.delta":
            self.write_reasoning(context, data["text"])
        elif name == "call.started":
            arguments = msgspec.Raw(msgspec.json.encode(data.get("arguments")))
            started_at = msgspec.convert(data["started_at"], datetime)
            self.begin_call(context, context.call_id, data["name"], data["kind"], arguments, started_at)
        values = {data["field"]: data["value"]} if name == "output.value" else data.get("output", {})
        for field, value in values.items():
            if isinstance(value, str) and name == "output.snapshot":
                self.write(context, field, value)
            else:
                self.write_value(context, field, value)

    def drop_open(self) -> None:
        """Drop what is not known to have ended, because the process that wrote it is gone."""
        with self._lock:
            self._restart(self.ended_steps)
        self._wake_soon()

    # Reading

    @contextlib.contextmanager
    def reader(self, after: int, *, reasoning: bool) -> Iterator["LiveReader"]:
        """Add a reader that has all events up to the id *after*."""
        reader = LiveReader(self, after, reasoning=reasoning)
        self.readers.add(reader)
        try:
            yield reader
        finally:
            self.readers.discard(reader)

    def changed_since(self, seen: int) -> tuple[list[_Writer], int]:
        """Return what has changed after the change number *seen*, oldest first, and the number of the last change."""
        found = []
        with self._lock:
            for written in reversed(self._writers.values()):
                if written.changed <= seen:
                    break
                found.append(written)
            if self._last is not None:
                self._last.is_read = True
            return found[::-1], self.changes

    def piece(self, text: _Text, start: int) -> str:
        """Return *text* from *start* to its end."""
        with self._lock:
            text.seek(start)
            return text.read()

    def last_piece(self, seen: int) -> "_Piece | None":
        """Return the text that was written last, if that is all that has changed after the change number *seen*."""
        with self._lock:
            last = self._last
            if last is None or last.since != seen or last.seen != self.changes or last.resets != last.written.resets:
                return None
            last.read()
            return last


class Unread:
    """Keeps what runs write for their first readers, until ``UNREAD_S`` after they have ended or begun to wait.

    Args:
        watch: see ``Runner.watch``.
        max_chars: max characters of all that have ended. Beyond it, or beyond ``MAX_UNREAD_RUNS``, the oldest are
            dropped, but never the newest.
    """

    def __init__(self, watch: Callable[[str], AbstractContextManager[LiveOutput]], max_chars: int) -> None:
        self._watch = watch
        self._max_chars = max_chars
        self._watched: dict[str, tuple[LiveOutput, ExitStack]] = {}
        #: when each that has ended is dropped, and its size, oldest first
        self._ended: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._chars = 0

    def add(self, run_id: str) -> None:
        """Watch a run."""
        stack = ExitStack()
        self._watched[run_id] = stack.enter_context(self._watch(run_id)), stack

    def end(self, run_id: str) -> None:
        """Note that a run is no longer active here."""
        if run_id in self._watched:
            chars = self._watched[run_id][0].chars
            self._chars += chars - self._ended.pop(run_id, (0, 0))[1]
            self._ended[run_id] = anyio.current_time() + UNREAD_S, chars
            while len(self._ended) > MAX_UNREAD_RUNS or (self._chars > self._max_chars and len(self._ended) > 1):
                self.drop(next(iter(self._ended)))

    def drop(self, run_id: str) -> None:
        """Stop watching a run."""
        if run_id in self._watched:
            self._chars -= self._ended.pop(run_id, (0, 0))[1]
            self._watched.pop(run_id)[1].close()

    def drop_expired(self) -> None:
        """Stop watching the runs that have ended a while ago."""
        while self._ended and next(iter(self._ended.values()))[0] <= anyio.current_time():
            self.drop(next(iter(self._ended)))


class _Place:
    """What a reader has of a writer. *sent* is the length of a text that was sent, or the number of a value.

    Attributes:
        wants_snapshot: it begins with a snapshot, because the client may have another text.
    """

    def __init__(self, written: _Writer, *, wants_snapshot: bool) -> None:
        self.wants_snapshot = wants_snapshot
        self.created = written.created
        self.resets = written.resets
        self.sent: dict[str, int] = {}
        self.reasoning = 0

    def is_before(self, piece: "_Piece") -> bool:
        """Whether a reader at this place has all but *piece*."""
        is_same = (self.created, self.resets) == (piece.written.created, piece.resets)
        return is_same and not self.wants_snapshot and self.sent.get(piece.field) == piece.start


class _Piece:
    """Text that was written last. It is all that has changed after the change number *since* until *seen*.

    Attributes:
        start: the length of the text without it.
        is_read: a reader has it, so it does not grow any more.
        event, end: what the first reader made of it, for all at the same place; and the length of the text with it.
    """

    def __init__(self, written: _Writer, field: str, start: int, seen: int) -> None:
        self.written, self.resets = written, written.resets
        self.field, self.start, self.end = field, start, 0
        self.since, self.seen = seen - 1, seen
        self.is_read = False
        self.event: Event | None = None

    def grow(self, written: _Writer, field: str, seen: int) -> bool:
        """Include the text of the change number *seen*. Return False if it cannot: it is read, or is not before it."""
        is_same = self.written is written and self.field == field and self.resets == written.resets
        can_grow = is_same and not self.is_read and self.seen == seen - 1
        if can_grow:
            self.seen = seen
        return can_grow

    def read(self) -> None:
        self.is_read = True
        if self.event is None:
            content = self.written.fields[self.field]
            assert isinstance(content, _Text)
            content.seek(self.start)
            text = content.read()
            self.end = self.start + len(text)
            self.event = self.written.event("output.delta", field=self.field, text=text)


class LiveReader:
    """One reader of a live output. A late one gets the earlier output as one ``output.snapshot``.

    Attributes:
        position: of the step that the reader has reached.
    """

    def __init__(self, live: LiveOutput, after: int, *, reasoning: bool) -> None:
        self._live = live
        self._has_reasoning = reasoning
        self._is_resumed = after > 0
        #: whether it may have a part of the next step that ends, also from an earlier attempt
        self._may_have_part = self._is_resumed and not is_end_of_step(after)
        self._places: dict[tuple[int, str], _Place] = {}
        self._pending: dict[tuple[int, str], _Writer] = {}
        self._joined_at = live.changed_since(0)[1] if live.next_is_late else 0
        live.next_is_late = True
        self._seen = 0
        self.position = 0

    @property
    def has_news(self) -> bool:
        """Whether there may be something new. Reading it without the lock is safe: each change wakes the readers."""
        return bool(self._pending) or self.has_unseen

    @property
    def has_unseen(self) -> bool:
        """Whether anything has changed since ``events`` was last called."""
        return self._seen != self._live.changes

    def events(self, after: int) -> Iterator[Event]:
        """Yield what is new in the steps whose ``step.started`` is not after the id *after*.

        A reader that does not take all events gets the others from the next call.
        """
        if not self._pending and (piece := self._last_piece()) is not None:
            yield piece
            return
        changed, self._seen = self._live.changed_since(self._seen)
        for written in changed:
            self._pending[written.key] = written
        yield from self._pending_events(after)

    def _last_piece(self) -> Event | None:
        """Return the text that was written last, if the reader has all but that."""
        last = self._live.last_piece(self._seen)
        place = None if last is None else self._places.get(last.written.key)
        if last is None or place is None or not place.is_before(last):
            return None
        place.sent[last.field], self._seen = last.end, last.seen
        return last.event

    def _pending_events(self, after: int) -> Iterator[Event]:
        for written in list(self._pending.values()):
            if started_id(written.attempt, written.position) <= after:
                is_all = yield from self._events_of(written)
                if is_all:
                    del self._pending[written.key]

    def passed(self, event: Event) -> None:
        """Forget the step or the call whose end is *event*, which the reader has now."""
        if event.name == "call.completed":
            key = event.data["position"], event.data["call_id"]
            self._places.pop(key, None)
            self._live.end_call(*key)  # another process may have executed it
        elif event.name == "step.completed":
            self._may_have_part = False
            self.position = event.data["position"] + 1
            for key in [key for key in self._places if key[0] < self.position]:
                del self._places[key]

    def missed_output(self, event: Event) -> Event | None:
        """Return the whole output of a step, or of an agent that it called, before *event*, its end.

        None if the reader cannot have a stale part of it, from before it was disconnected.
        """
        data = event.data
        is_step = event.name == "step.completed"
        if not self._may_have_part or not (is_step or data.get("kind") == "agent"):
            return None
        place = self._places.get((data["position"], "" if is_step else data["call_id"]))
        if place is not None and not place.wants_snapshot:
            return None
        of = {name: data[name] for name in ("run_id", "attempt", "position", "agent_name")}
        if not is_step:
            of |= {"agent_name": data["name"], "call_id": data["call_id"]}
        if data.get("result") is None:  # the call has failed, or its result is too long to be shown
            return Event(id=None, name="output.reset", data=of)
        return Event(id=None, name="output.snapshot", data={**of, "output": data["result"]})

    def _events_of(self, written: _Writer) -> Generator[Event, None, bool]:
        """Yield what is new of one writer. Returns False if it was reset meanwhile, so that there is more."""
        place, resets = self._places.get(written.key), written.resets
        is_old = written.created <= self._joined_at
        if place is None and is_old and written.is_done:
            return True
        is_new_call = written.call is not None and (place is None or place.created != written.created)
        if place is None:
            is_late = is_old or self._is_resumed
            place = self._places[written.key] = _Place(written, wants_snapshot=is_late)
        place.created = written.created
        if is_new_call:
            assert written.call is not None
            yield written.event("call.started", **written.call)
        if place.resets != resets:
            has_sent = place.sent or place.reasoning
            place.sent, place.reasoning, place.resets = {}, 0, resets
            if has_sent:
                yield written.event("output.reset")
        if place.wants_snapshot and written.fields:
            place.wants_snapshot = False
            yield self._snapshot(written, place)
        if self._has_reasoning and (text := self._live.piece(written.reasoning, place.reasoning)):
            place.reasoning += len(text)
            yield written.event("reasoning.delta", text=text)
        for name, content in list(written.fields.items()):
            if written.resets != resets:  # while the last event was sent
                return False
            sent = place.sent.get(name, 0)
            if isinstance(content, _Text):
                if text := self._live.piece(content, max(0, sent)):
                    place.sent[name] = max(0, sent) + len(text)
                    yield written.event("output.delta", field=name, text=text)
            elif content[0] != sent:
                place.sent[name] = content[0]
                yield written.event("output.value", field=name, value=content[1])
        return True

    def _snapshot(self, written: _Writer, place: _Place) -> Event:
        output: dict[str, Any] = {}
        for name, content in list(written.fields.items()):
            if isinstance(content, _Text):
                output[name] = self._live.piece(content, 0)
                place.sent[name] = len(output[name])
            else:
                place.sent[name], output[name] = content
        return written.event("output.snapshot", output=output)


def _may_become(content: _Text | tuple[int, msgspec.Raw], value: Any) -> bool:
    """Whether a field that was written in part can become *value*; UNSET if the result has no such field."""
    if isinstance(content, _Text):
        return isinstance(value, str) and value.startswith(content.getvalue())
    return value is not msgspec.UNSET

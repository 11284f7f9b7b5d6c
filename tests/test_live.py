"""The live output of a run: whatever happens, each reader ends with the exact text of the step."""

import asyncio
import errno
import itertools
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flock.engine import relay
from flock.runs import JSON_NULL, Event, Run, RunContext, new_id, now, started_id
from flock.steps.live import LiveOutput, LiveReader

RUN = Run(run_id=new_id(), flock="f", agent_name="a", inputs=msgspec.Raw(b"{}"), created_at=now())
FIELDS = ("title", "text")
STEP = started_id(1, 0)


def context_of(live: LiveOutput | None, call_id: str = "", attempt: int = 1) -> RunContext:
    run = msgspec.structs.replace(RUN, attempt=attempt)
    context = RunContext(run, "a", lambda progress: None, live=lambda: live, output_names=FIELDS)
    context.call_id = call_id
    return context


class Client:
    """What a client makes of the events, by the rules of the documentation."""

    def __init__(self, live: LiveOutput, *, has_stale_text: bool = False) -> None:
        self.outputs: dict[str, dict[str, Any]] = {"": {"text": "stale"}} if has_stale_text else {}
        self.events: list[Event] = []
        self.reader = LiveReader(live, STEP if has_stale_text else 0, reasoning=False)
        live.readers.add(self.reader)

    def read(self, most: int = 10**9, after: int = STEP) -> None:
        for event in itertools.islice(self.reader.events(after), most):
            self.on(event)

    def on(self, event: Event) -> None:
        self.events.append(event)
        output = self.outputs.setdefault(event.data.get("call_id", ""), {})
        match event.name:
            case "output.delta":
                assert event.data["text"], "there are no empty deltas"
                output[event.data["field"]] = output.get(event.data["field"], "") + event.data["text"]
            case "output.value":
                output[event.data["field"]] = msgspec.json.decode(event.data["value"])
            case "output.reset":
                output.clear()
            case "output.snapshot":
                output.clear()
                sent = event.data["output"]
                output |= msgspec.json.decode(sent if isinstance(sent, msgspec.Raw) else msgspec.json.encode(sent))

    def end(self, result: msgspec.Raw) -> None:
        """Receive the end of the step, as ``EngineBase.events`` sends it."""
        self.read()
        data = {"run_id": RUN.run_id, "attempt": 1, "position": 0, "agent_name": "a", "result": result}
        ended = Event(id=STEP + 100, name="step.completed", data=data)
        if (missed := self.reader.missed_output(ended)) is not None:
            self.on(missed)
        self.reader.passed(ended)


def shown(output: dict[str, Any]) -> dict[str, bytes]:
    """Return the JSON of each field, so that 1 is not true. An empty text is no event."""
    return {name: msgspec.json.encode(value) for name, value in output.items() if value != ""}


TEXTS = st.text(max_size=5)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from(FIELDS), TEXTS),
        st.tuples(st.just("value"), st.sampled_from(["tags", "text"]), st.sampled_from([[0], 1, None, "a whole text"])),
        st.tuples(st.just("reasoning"), TEXTS),
        st.tuples(st.just("reset")),
        st.tuples(st.just("begin")),
        st.tuples(st.just("join"), st.booleans()),
        st.tuples(st.just("read"), st.integers(0, 9), st.integers(1, 3)),
        st.tuples(st.just("call"), st.sampled_from(["x", "y"]), TEXTS),
        st.tuples(st.just("end call"), st.sampled_from(["x", "y"])),
    ),
    max_size=40,
)


@given(ACTIONS, st.booleans(), TEXTS, st.integers(1, 2000))
def test_each_reader_ends_with_the_exact_output(
    actions: Sequence[tuple[Any, ...]], ends_as_written: bool, other: str, max_chars: int
) -> None:
    """For all orders of writes, resets, turns that start again, calls, readers that join, and slow readers.

    One of the readers is another process.
    """

    async def main() -> None:
        live, copied = LiveOutput(max_chars), LiveOutput(max_chars)
        context = context_of(live)
        clients, copy = [Client(live), Client(copied)], LiveReader(live, 0, reasoning=True)
        live.readers.add(copy)
        written, values, has_written = dict[str, Any](), set[str](), False

        def copy_all() -> None:
            for event in copy.events(STEP):
                copied.apply(event.name, msgspec.json.decode(msgspec.json.encode(event.data)))

        for action in actions:
            match action:
                case ("write", field, text):
                    context.emit(text, field)
                    if text:
                        before = written.get(field) if field not in values else None
                        values.discard(field)
                        written[field], has_written = (before or "") + text, True
                case ("value", field, value):
                    context.emit_value(field, value)
                    values.add(field)
                    written[field], has_written = value, True
                case ("reasoning", text):
                    context.emit_reasoning(text)
                case ("reset",):
                    context.reset_output()
                    written.clear()
                case ("begin",):
                    live.begin_step(context)
                    written.clear()
                    has_written = False
                case ("join", has_stale_text):
                    clients.append(Client(live, has_stale_text=has_stale_text))
                case ("read", number, most):
                    copy_all()
                    clients[number % len(clients)].read(most)
                case ("call", call_id, text):
                    live.begin_call(context, call_id, "other", "agent", JSON_NULL, now())
                    context_of(live, call_id).emit(text, "text")
                case ("end call", call_id):
                    live.end_call(0, call_id)
        final = dict(written) if ends_as_written else {"text": other, "tags": True}
        result = msgspec.Raw(msgspec.json.encode(final))
        context.settle_output(result)
        copy_all()
        for client in clients:
            client.end(result)
            if has_written or client.reader._is_resumed:
                assert shown(client.outputs.get("", {})) == shown(final)

    anyio.run(main)


@pytest.mark.anyio
async def test_threads_may_write_while_readers_read() -> None:
    live = LiveOutput(10**9)
    live_context = context_of(live)
    clients = [Client(live) for _ in range(5)]

    def write() -> None:
        for number in range(2000):
            if number == 1000:
                live_context.reset_output()
            live_context.emit(f"{number} ", "text")

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        changed = live.changed.next
        for client in clients:
            client.read(1)
        with anyio.move_on_after(1):
            await changed.wait()
    thread.join()
    expected = {"text": "".join(f"{number} " for number in range(1000, 2000))}
    for client in clients:
        client.read()
        assert client.outputs[""] == expected


@pytest.mark.anyio
async def test_who_joins_late_gets_one_snapshot_and_then_deltas() -> None:
    live = LiveOutput(10**6)
    context, first = context_of(live), Client(live)
    for text in "abc":
        context.emit(text, "text")
        first.read()
    late = Client(live)
    late.read()
    context.emit("d", "text")
    context.emit("e", "text")
    for client in (first, late):
        client.read()
    assert [event.name for event in first.events] == ["output.delta"] * 4
    assert [event.name for event in late.events] == ["output.snapshot", "output.delta"]
    assert late.events[1].data["text"] == "de", "adjacent text is merged"
    assert first.outputs == late.outputs == {"": {"text": "abcde"}}


@pytest.mark.anyio
async def test_readers_at_the_same_place_get_the_same_event() -> None:
    live = LiveOutput(10**6)
    context = context_of(live)
    with live.reader(0, reasoning=False) as one, live.reader(0, reasoning=False) as other:
        with live.reader(0, reasoning=True) as curious:
            context.emit("a", "text")
            for reader in (one, other, curious):
                list(reader.events(STEP))
            context.emit("b", "text")
            (piece,) = one.events(STEP)
            (same,) = other.events(STEP)
            assert same is piece
            assert not other.has_news

            context.emit("c", "text")
            assert len(list(one.events(STEP))) == 1
            context.emit_reasoning("why")
            assert [event.data["text"] for event in other.events(STEP)] == ["c"], (
                "it changed since, so it is made again"
            )
            assert [event.data["text"] for event in curious.events(STEP)] == ["why", "bc"]

            context.reset_output()
            context.emit("d", "text")
            assert [event.name for event in one.events(STEP)] == ["output.reset", "output.delta"]
            assert [event.name for event in other.events(STEP)] == ["output.reset", "output.delta"]
            context.emit("e", "text")
            assert [event.data["text"] for event in other.events(STEP)] == ["e"]
            assert [event.data["text"] for event in one.events(STEP)] == ["e"]


@pytest.mark.anyio
async def test_text_of_one_turn_is_one_event_for_all_readers_with_and_without_reasoning() -> None:
    live = LiveOutput(10**6)
    context = context_of(live)
    with live.reader(0, reasoning=False) as one, live.reader(0, reasoning=True) as curious:
        context.emit("a", "text")
        for reader in (one, curious):
            list(reader.events(STEP))
        for text in "bcd":
            context.emit(text, "text")
        (piece,) = one.events(STEP)
        assert piece.data["text"] == "bcd"
        context.emit("e", "text")
        (last,) = one.events(STEP)
        assert last.data["text"] == "e", "what a reader has does not grow"
        assert [event.data["text"] for event in curious.events(STEP)] == ["bcde"]
        context.emit("f", "text")
        (last,) = curious.events(STEP)
        (same,) = one.events(STEP)
        assert same is last


@pytest.mark.anyio
async def test_a_piece_wakes_its_reader_in_the_next_turn_of_the_event_loop() -> None:
    live = LiveOutput(10**6)
    context, client, is_waiting = context_of(live), Client(live), anyio.Event()

    async def read() -> None:
        is_waiting.set()
        await live.changed.wait()
        client.read()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await is_waiting.wait()
        context.emit("a", "text")
        context.emit("b", "text")
        await anyio.lowlevel.checkpoint()
        assert client.outputs == {"": {"text": "ab"}}


@pytest.mark.anyio
@pytest.mark.parametrize("interval_s", [3600, 0.001])
async def test_fast_text_waits_for_its_turn_or_for_what_is_no_text(
    interval_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flock.steps.live.PIECE_INTERVAL_S", interval_s)
    live = LiveOutput(10**6)
    context, client, texts = context_of(live), Client(live), list[str]()

    async def read() -> None:
        while texts[-1:] != ["abcd"]:
            await live.changed.wait()
            client.read()
            if client.events:
                texts.append(client.outputs[""]["text"])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        live.note_news()
        for text in "abc":
            await anyio.wait_all_tasks_blocked()
            context.emit(text, "text")
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(context.emit, "d", "text")
        if interval_s == 3600:
            await anyio.wait_all_tasks_blocked()
            assert texts == ["a"], "the first piece is sent at once, also just after another event"
            live.note_news()


@pytest.mark.anyio
async def test_the_last_piece_of_a_call_may_be_forgotten_before_it_is_read() -> None:
    live = LiveOutput(100)
    context, client = context_of(live, "x"), Client(live)
    context.emit("a", "text")
    client.read()
    context.emit("b" * 200, "text")
    live.end_call(0, "x")
    client.read()
    assert client.outputs == {"x": {"text": "a"}}


@pytest.mark.anyio
async def test_halves_of_characters_arrive_as_what_can_be_sent() -> None:
    """In text and in reasoning, each on its own."""
    live = LiveOutput(10**6)
    context, events = context_of(live), list[Event]()
    with live.reader(0, reasoning=True) as reader:
        for half in ("\ud83d", "\ude00", "\ud83d", "x", "\ude00"):
            context.emit(half, "text")
            context.emit(half, "title")
            context.emit_reasoning(half)
            events += reader.events(STEP)
    sent = [(event.data.get("field"), event.data["text"]) for event in events]
    for field in ("text", "title", None):
        assert [text for name, text in sent if name == field] == ["\U0001f600", "?x", "?"]
    context.settle_output(msgspec.Raw(msgspec.json.encode({"text": "\U0001f600?x?", "title": "a"})))
    client = Client(live)
    client.read()
    assert client.outputs == {"": {"text": "\U0001f600?x?", "title": "a"}}


@pytest.mark.anyio
async def test_nothing_of_a_step_is_sent_before_its_start() -> None:
    live = LiveOutput(10**6)
    context_of(live).emit("a", "text")
    client = Client(live)
    client.read(after=STEP - 1)
    assert client.events == []
    client.read(after=STEP)
    assert client.outputs == {"": {"text": "a"}}


@pytest.mark.anyio
async def test_a_turn_that_starts_again_resets_what_was_written_but_not_the_calls_that_have_ended() -> None:
    live = LiveOutput(10**6)
    client, context = Client(live), context_of(live)
    context.emit("a", "text")
    for call_id in ("done", "open"):
        live.begin_call(context, call_id, "other", "agent", JSON_NULL, now())
        context_of(live, call_id).emit(call_id, "text")
    live.end_call(0, "done")
    client.read()
    again = context_of(live, attempt=2)
    live.begin_step(again)
    again.emit("b", "text")
    client.read(after=STEP)
    assert client.outputs == {"": {"text": "a"}, "done": {"text": "done"}, "open": {"text": "open"}}, "not yet started"
    client.read(after=started_id(2, 0))
    assert client.outputs == {"": {"text": "b"}, "done": {"text": "done"}, "open": {}}
    assert [event.data["attempt"] for event in client.events[-3:]] == [2, 2, 2]


@pytest.mark.anyio
async def test_the_text_of_calls_that_have_ended_takes_bounded_room() -> None:
    live = LiveOutput(100_000)
    context = context_of(live)
    for number in range(5000):
        live.begin_call(context, str(number), "other", "agent", JSON_NULL, now())
        context_of(live, str(number)).emit("x" * 1000, "text")
        live.end_call(0, str(number))
        context_of(live, str(number)).emit("what a task wrote that outlived its call", "text")
    assert len(live.changed_since(0)[0]) < 100
    context.emit("y" * 200_000, "text")
    context.emit("z", "text")  # one agent has no more room
    client = Client(live)
    client.read()
    assert client.outputs[""] == {"text": "y" * 200_000}
    context.settle_output(msgspec.Raw(b'{"text": "short"}'))
    client.read()
    assert client.outputs[""] == {"text": "short"}


@pytest.mark.anyio
@pytest.mark.parametrize("value", ["x" * 50_000, ["x" * 50_000]], ids=["text", "value"])
@pytest.mark.parametrize("is_late", [False, True], ids=["before its end", "after its end"])
async def test_the_results_of_calls_that_have_ended_take_bounded_room(value: Any, is_late: bool) -> None:
    """They complete what the agents have written, so they count like it."""
    live = LiveOutput(100_000)
    context, result = context_of(live), msgspec.Raw(msgspec.json.encode({"text": "x", "title": value}))
    for number in map(str, range(40)):
        live.begin_call(context, number, "other", "agent", JSON_NULL, now())
        called = context_of(live, number)
        called.emit("x", "text")
        if is_late:
            live.end_call(0, number)
        called.settle_output(result)
        live.end_call(0, number)
        assert len(live.changed_since(0)[0]) <= 2
    for number in map(str, range(40, 80)):  # these need little room again
        live.begin_call(context, number, "other", "agent", JSON_NULL, now())
        context_of(live, number).emit("x", "text")
        live.end_call(0, number)
    assert len(live.changed_since(0)[0]) >= 40


@pytest.mark.anyio
async def test_text_whose_beginning_nobody_watched_is_not_sent() -> None:
    """It would be wrong. At the end of the turn, the whole text is sent."""
    live: LiveOutput | None = None
    context = RunContext(RUN, "a", lambda progress: None, live=lambda: live, output_names=FIELDS)
    assert not context.is_watched
    context.emit("a", "text")
    live = LiveOutput(10**6)
    client = Client(live)
    assert context.is_watched
    context.emit("b", "text")
    client.read()
    assert client.events == []
    context.settle_output(msgspec.Raw(b'{"text": "ab"}'))
    client.read()
    assert client.outputs == {"": {"text": "ab"}}


@pytest.mark.anyio
async def test_a_field_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"The output of 'a' has no field 'texts'\. Its fields: title, text\."):
        context_of(None).emit("a", "texts")


@pytest.mark.anyio
async def test_a_line_that_is_not_understood_ends_only_the_copy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be of another version."""
    path = str(tmp_path / "live")

    async def send_strange_line(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(b'["output.delta",{"run_id":"r","attempt":1,"position":0,"agent_name":"a"}]\n')

    async with await anyio.create_unix_listener(path) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, send_strange_line)
        assert not await relay.follow(path, RUN.run_id, LiveOutput(10**6))
        tasks.cancel_scope.cancel()
    assert "cannot be read" in caplog.text


@pytest.mark.anyio
async def test_a_follower_may_be_cancelled_when_a_line_arrives(tmp_path: Path) -> None:
    """Both in one iteration of the event loop, whose exception handler fails this test if anything is logged."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(relay.follow, path, RUN.run_id, LiveOutput(10**6))
            await anyio.wait_all_tasks_blocked()
            with listener.accept()[0] as connection:
                assert connection.recv(1000).strip()
                await anyio.wait_all_tasks_blocked()
                connection.send(b"\n")
                asyncio.get_running_loop().call_soon(tasks.cancel_scope.cancel)
                await anyio.sleep_forever()


@pytest.mark.anyio
async def test_an_engine_that_cannot_accept_a_connection_accepts_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, live = str(tmp_path / "socket"), LiveOutput(10**6)
    listener = await relay.listen(path)
    assert listener is not None
    accept, failures = listener.accept, [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    async def accept_at_last() -> anyio.abc.SocketStream:
        if failures:
            raise anyio.BrokenResourceError from failures.pop()
        return await accept()

    monkeypatch.setattr(listener, "accept", accept_at_last)
    monkeypatch.setattr(relay, "RETRY_AFTER_S", 0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.serve, listener, path, lambda run_id: nullcontext(live), lambda run_id: False)
        assert await relay.follow(path, RUN.run_id, LiveOutput(10**6)), "it gets the last line"
        tasks.cancel_scope.cancel()
    assert "another process cannot connect: [Errno 24] Too many open files" in caplog.text
    assert not os.path.exists(path)  # noqa: ASYNC240

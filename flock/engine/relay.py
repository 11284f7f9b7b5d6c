"""The live output of runs for the other processes on a store: each engine serves a Unix socket beside the file.

A process that watches a run of another engine connects to the socket of that engine, sends the id of the run, and gets
its live events as lines of JSON. The connection itself makes the run watched there. If it breaks, the other process has
only the records, until it can connect to the next owner of the run.
"""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import anyio
import anyio.abc
import msgspec
from anyio.abc import SocketAttribute

from flock.runs import Engine, Run
from flock.steps.live import LiveOutput
from flock.store.port import Store

logger = logging.getLogger("flock.store")

#: Max length of the path of a Unix socket on macOS; Linux allows 107 bytes.
MAX_PATH_BYTES = 103
#: What breaks a connection.
BROKEN = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, msgspec.DecodeError)
#: The pause after a connection could not be accepted, in seconds.
RETRY_AFTER_S = 1.0
#: The name of a line that says how many steps have ended, and whether the run is no longer active there.
STATE = "state"
#: How long a reader waits for the text of a step that has ended in another process, in seconds.
MAX_COPY_S = 1.0
#: The time after which an engine has seen what another one has written, in seconds.
SEEN_AFTER_S = 0.5
#: Later than all events.
ALL = 2**63


def socket_path(store_path: str, engine_id: str) -> str | None:
    """Return the path of an engine's socket, relative if that is shorter; None if it is too long for a socket."""
    found = path = f"{store_path}-live-{engine_id}"
    with contextlib.suppress(OSError):  # the working directory was removed
        found = min(path, os.path.relpath(path), key=len)
    return found if len(os.fsencode(found)) <= MAX_PATH_BYTES else None


async def listen(path: str) -> anyio.abc.SocketListener | None:
    """Return a listener on a Unix socket; None, with a warning, if there can be none. ``serve`` closes it."""
    try:
        return await anyio.create_unix_listener(path, mode=0o600)
    except OSError as exc:
        logger.warning("Other processes on this store do not get the text of running agents: %s: %s", path, exc)
        return None


async def serve(
    listener: anyio.abc.SocketListener,
    path: str,
    watch: Callable[[str], AbstractContextManager[LiveOutput]],
    is_active: Callable[[str], bool],
) -> None:
    """Serve the live output of the runs of this engine until the task is cancelled. Then remove the socket.

    Args:
        path: of the listener's socket.
        watch: see ``Runner.watch``.
        is_active: whether a run is active in this engine.
    """

    async def handle(stream: anyio.abc.ByteStream) -> None:
        async with stream:
            try:
                async with anyio.create_task_group() as tasks:
                    lines = _lines(stream)
                    run_id = str(msgspec.json.decode(await anext(lines, b'""')))
                    tasks.start_soon(_cancel_at_end, lines, tasks.cancel_scope)
                    await _send_all(stream, run_id)
                    tasks.cancel_scope.cancel()
            except* BROKEN:
                pass
            except* Exception:
                logger.exception("the live output of a run cannot be sent to another process")

    async def _send_all(stream: anyio.abc.ByteStream, run_id: str) -> None:
        with watch(run_id) as live, live.reader(0, reasoning=True) as reader:
            is_last = False
            while not is_last:
                changed, ended_steps, is_last = live.changed.next, live.ended_steps, not is_active(run_id)
                for event in reader.events(ALL):
                    await stream.send(msgspec.json.encode((event.name, event.data)) + b"\n")
                state = {"ended_steps": ended_steps, "is_last": is_last}
                await stream.send(msgspec.json.encode((STATE, state)) + b"\n")
                if not is_last:
                    await changed.wait()

    with _removing(path):
        async with listener, anyio.create_task_group() as tasks:
            while True:
                await anyio.wait_readable(listener.extra(SocketAttribute.raw_socket))  # as in ``_lines``
                try:
                    tasks.start_soon(handle, await listener.accept())
                except anyio.BrokenResourceError as exc:  # such as too many open files
                    logger.warning("%s: another process cannot connect: %s", path, exc.__cause__)
                    await anyio.sleep(RETRY_AFTER_S)


@contextlib.contextmanager
def _removing(path: str) -> Iterator[None]:
    """Remove a file after the block, even if the working directory has changed."""
    whole_path = os.path.abspath(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(whole_path)


async def follow(path: str, run_id: str, live: LiveOutput) -> bool:
    """Copy the live output of a run of another engine to *live*. Return False if the connection broke."""
    is_last = False
    try:
        async with await anyio.connect_unix(path) as stream:
            await stream.send(msgspec.json.encode(run_id) + b"\n")
            live.drop_open()  # what is known is of an earlier execution
            async for line in _lines(stream):
                name, data = msgspec.json.decode(line, type=tuple[str, dict[str, Any]])
                if name == STATE:
                    is_last = data["is_last"]
                    live.end_step(data["ended_steps"] - 1)
                else:
                    live.apply(name, data)
    except BROKEN:
        pass
    except Exception:  # a line that this version does not understand must not end the engine
        logger.exception("the live output of a run of another process cannot be read")
        return False
    return is_last


class Relay:
    """Copies the live output of runs of other engines, for those who read it here.

    Args:
        engine_id: of *engine*.
        start_task: starts a function with arguments in a new task. Returns False if the engine is shutting down.
    """

    def __init__(self, engine: Engine, store: Store, engine_id: str, start_task: Callable[..., bool]) -> None:
        self._engine, self._store, self._engine_id, self._start_task = engine, store, engine_id, start_task

    async def follow(self, run: Run, live: LiveOutput) -> None:
        """Copy the live output of a run of another engine. Return when that of the steps of *run* has arrived."""
        if live.follower is None and run.is_active and self._store.is_shared:
            owner = run.owner if run.batch_id is None else (await self._engine.get_batch(run.batch_id)).owner
            is_other = owner not in (None, self._engine_id, live.lost_owner)
            if is_other and live.follower is None and self._start_task(self._copy_live, run.run_id, owner, live):
                live.follower = anyio.CancelScope()
        with anyio.move_on_after(MAX_COPY_S):
            while live.follower is not None and live.ended_steps < len(run.steps):
                await live.changed.wait()

    async def _copy_live(self, run_id: str, owner: str, live: LiveOutput) -> None:
        assert live.follower is not None
        with live.follower:
            path = socket_path(self._store.path, owner)
            if path is not None and await follow(path, run_id, live):
                await anyio.sleep(SEEN_AFTER_S)  # the record will have changed by then
            else:
                live.lost_owner = owner
                live.drop_open()
        live.follower = None
        live.note_news()


async def _cancel_at_end(lines: AsyncIterator[bytes], scope: anyio.CancelScope) -> None:
    async for _ in lines:
        pass
    scope.cancel()


async def _lines(stream: anyio.abc.ByteStream) -> AsyncIterator[bytes]:
    rest: list[bytes] = []
    socket = stream.extra(SocketAttribute.raw_socket)
    while True:
        await anyio.wait_readable(socket)  # asyncio logs an error if ``receive`` is cancelled when data arrives
        try:
            received = await stream.receive()
        except anyio.EndOfStream:
            return
        *whole, last = received.split(b"\n")
        for line in whole:
            yield b"".join((*rest, line))
            rest.clear()
        rest.append(last)

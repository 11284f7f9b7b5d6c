"""Reads the records of runs for event streams."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio.lowlevel
from msgspec.structs import replace

from flock.engine.base import RunReader
from flock.engine.runner import Runner
from flock.runs import Call, Engine, Event, Run
from flock.steps.live import LiveOutput, LiveReader


class StoreReader(RunReader):
    """Reads a run from memory while it is active here, and otherwise an outline of it from the store.

    Args:
        follow: see ``Relay.follow``.
        changed_outline: returns the version of a stored run, and its outline unless that version is known already.
        output: the live output of the run, of which *live* is its reader.
    """

    live: LiveReader

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        follow: Callable[[Run, LiveOutput], Awaitable[None]],
        changed_outline: Callable[[str, Any], Awaitable[tuple[Any, Run | None]]],
        run_id: str,
        output: LiveOutput,
        live: LiveReader,
    ) -> None:
        super().__init__(engine.get_run, engine.get_calls, run_id)
        self.live = live
        self._engine, self._runner = engine, runner
        self._follow, self._changed_outline = follow, changed_outline
        self._output = output
        self._version: Any = None
        self._outline: Run | None = None
        self._news = self._seen_news = -1
        #: the attempt and position of a step, the number of the first call of the last page, and the page with its rows
        self._step, self._first = (0, 0), 0
        self._page: Sequence[tuple[int, Call]] = ()

    @property
    def has_news(self) -> bool:
        return self._output.news != self._seen_news

    async def read(self) -> Run:
        active = self._runner.active.get(self._run_id)
        news, self._news = self._news, self._output.news
        if active is not None and not active.run.is_stub:
            self._outline = None
            return active.run
        if self._outline is None or news != self._news:
            known = None if self._outline is None else self._version
            self._version, changed = await self._changed_outline(self._run_id, known)
            self._outline = changed or self._outline
        assert self._outline is not None
        await self._follow(self._outline, self._output)
        return self._outline

    async def call(self, run: Run, position: int, number: int) -> Call | None:
        if self._step != (run.attempt, position):
            self._step, self._first, self._page = (run.attempt, position), 0, ()
        at = number - self._first
        if not 0 <= at < len(self._page):
            after, skipped = 0, number
            if self._page and at == len(self._page):
                after, skipped = self._page[-1][0], 0  # the next one is found at once
            found = await self._runner.store.next_calls(run.run_id, position, skipped, after)
            if not found:
                return None
            self._first, self._page, at = number, found, 0
        return self._page[at][1]

    def seen(self) -> None:
        self._seen_news = self._news

    async def changed(self) -> None:
        if self.has_news or (self.live.has_unseen and not self._output.wakes_soon):  # since the last look
            await anyio.lowlevel.checkpoint()
        else:
            await self._output.changed.wait()

    async def present(self, event: Event, run: Run) -> Event:
        if event.data.get("result") is None or event.name == "call.completed":
            return event
        return replace(
            event, data={**event.data, "result": await self._engine.shown_result(run, event.data.get("position"))}
        )

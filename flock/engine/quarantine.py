"""Suspects are executed in groups, so that the process does not die with all its runs if one of them kills it again."""

import logging
from collections import deque
from collections.abc import Sequence

import anyio

from flock.runs import Run, RunStatus
from flock.scopes import Signal
from flock.store.suspects import Executing, SuspectGroup

logger = logging.getLogger("flock.runs")

#: How long no run may start, so that the process has nothing to execute and suspects can, and then how long runs may
#: start again: one that is running may be waiting for another one to start. In seconds.
HOLD_S = 10.0
#: How long a group waits for members that do not start, such as items of a batch that is being cancelled, in seconds.
ARRIVAL_S = 5.0


class Quarantine:
    """Which runs may start in this process.

    While groups of suspects are left, nothing else starts. The first group starts when nothing else is executed, and
    each other one when the one before has ended, or has lived for its time. When the last one has, all runs may start.
    """

    def __init__(self, executing: Executing) -> None:
        self._executing = executing
        self._groups: deque[SuspectGroup] = deque()
        #: suspects whose group has not started, and those whose group has
        self._held_back: set[str] = set()
        self._admitted: set[str] = set()
        #: of the newest group: the runs that have not ended, and those that have not begun
        self._living: set[str] = set()
        self._absent: set[str] = set()
        self._life_s = self._lives_until = self._since = 0.0
        self._is_closed = False
        self._changed = Signal()

    def add(self, groups: Sequence[SuspectGroup]) -> None:
        """Execute *groups* after those that are left. Call it before their runs can start."""
        if groups:
            template = "%d runs were running in two or more deaths of their process: they start first, in %d groups"
            logger.warning(template, sum(len(group.run_ids) for group in groups), len(groups))
        if not self._held_back:
            self._since = anyio.current_time()
        self._groups += groups
        self._held_back.update(*(group.run_ids for group in groups))
        self.check()

    def admits(self, run: Run) -> bool:
        """Whether a run may start. One that has started here is never held up."""
        return run.status is not RunStatus.STARTING or self.is_open_to(run.run_id)

    def is_open_to(self, run_id: str) -> bool:
        return run_id in self._admitted or not (self._is_closed or run_id in self._held_back)

    async def wait(self, run: Run) -> None:
        """Wait until a run may start."""
        while not self.admits(run):
            await self._changed.wait()

    def begin(self, run_id: str) -> None:
        """Note that a run is being executed."""
        self._executing.begin(run_id)
        if run_id in self._absent:
            self._absent.discard(run_id)
            self._lives_until = anyio.current_time() + self._life_s + (ARRIVAL_S if self._absent else 0)

    def end(self, run_id: str) -> None:
        """Note that a run is not executed any more."""
        self._executing.end(run_id)
        self._living.discard(run_id)
        self._absent.discard(run_id)

    def check(self) -> None:
        """Let the next group start, or all runs, if it is time to. It is called 20 times a second."""
        at = anyio.current_time()
        if self._admitted:
            if self._living and at < self._lives_until:
                return
        elif not self._held_back:
            return
        elif len(self._executing):
            if (is_closed := (at - self._since) % (2 * HOLD_S) < HOLD_S) is not self._is_closed:
                self._close(is_closed)
            return
        self._executing.group += 1
        if (group := self._next_group()) is not None:
            run_ids, self._life_s = group
            self._admitted.update(run_ids)
            self._held_back.difference_update(run_ids)
            self._living, self._absent = set(run_ids), set(run_ids)
            self._lives_until = at + self._life_s + ARRIVAL_S
        else:
            self._admitted.clear()
        self._close(bool(self._admitted))

    def _next_group(self) -> SuspectGroup | None:
        return self._groups.popleft() if self._groups else None

    def _close(self, is_closed: bool) -> None:
        """Let only admitted suspects start, or all runs except suspects. Waiting runs check again."""
        self._is_closed = is_closed
        self._changed.notify()

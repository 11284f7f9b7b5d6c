"""Suspects in a worker: steps that may have killed the workers that executed them. Others do not start beside them.

Heartbeats carry what is known. So a worker that starts an activity knows what became of the earlier attempts.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import Callable

import anyio
from temporalio import activity
from temporalio.client import AsyncActivityCancelledError

from flock.engine.quarantine import Quarantine
from flock.steps.outcomes import DEATHS_ALONE
from flock.store.suspects import GROUPS, Executing, SuspectGroup, life_s
from flock.temporal.cluster import Cluster, logger
from flock.temporal.messages import Deaths, Heartbeat, ItemsDone

#: From this number of deaths on, what was being executed is a suspect.
SUSPICIOUS = 2
#: How long the first group waits for other suspects, and the interval of checks, in seconds. The cluster notices the
#: death of a worker at a different time for each of its activities.
GATHER_S, CHECK_S = 1.5, 0.05


class Suspicion:
    """How often a worker died while it executed what an activity executes now: a step of a run or of an item.

    Args:
        last: the last heartbeat of the earlier attempts.
        beat: returns the next heartbeat. It contains ``report``.

    Attributes:
        misses: see ``Heartbeat``.
        is_again: the step may have been started before.
        is_held: it waits, because of suspects.
        is_stopped: the attempt ends without a death.
        is_alone: the worker executes nothing else.
    """

    is_held = is_stopped = is_alone = False

    def __init__(self, last: Heartbeat | ItemsDone, cluster: Cluster, beat: Callable[[], object]) -> None:
        info, deaths = activity.info(), last.deaths or Deaths()
        self.attempt, self.misses = info.attempt, last.misses
        self._token = info.task_token
        self._context = contextvars.copy_context()  # another activity may send the heartbeat
        self._cluster = cluster
        self._beat = beat
        # Workers of earlier versions count only misses. An operator may have reset the attempts.
        self._survived = min(max(deaths.survived, self.misses), info.attempt - 1)
        self._alone = deaths.alone + (0 < deaths.alone_at == info.attempt - 1)
        self._was_held = False
        self.is_again = self.deaths > 0 or (info.attempt - self.misses > 1 and not deaths.is_held)

    @property
    def deaths(self) -> int:
        """The number of deaths since the last finished step or call."""
        return self.attempt - 1 - self._survived

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= SUSPICIOUS

    def is_proven(self, max_recoveries: int) -> bool:
        """Whether the step has killed its workers."""
        return self.deaths >= max_recoveries and self._alone >= min(max_recoveries, DEATHS_ALONE)

    @property
    def must_confirm(self) -> bool:
        """Whether the cluster must know that the step begins, since it could kill the worker before a heartbeat."""
        return self.attempt > 1 or self._was_held

    @property
    def is_stopping(self) -> bool:
        """The worker stops because it was asked to, so its end is no death."""
        return self.is_stopped or self._context.run(activity.is_worker_shutdown)

    def clear(self) -> bool:
        """Forget the deaths, because a step or a call has finished. Returns False if there were none."""
        was_clear, self._survived, self._alone = self.deaths == 0, self.attempt - 1, 0
        return not was_clear

    def report(self) -> Deaths | None:
        """Return what the next attempt will need to know if the worker dies now. None is short for nothing."""
        report = Deaths(
            survived=self._survived + (self.is_held or self.is_stopping),
            alone=self._alone,
            alone_at=self.attempt if self.is_alone and not self.is_stopping else 0,
            is_held=self.is_held,
        )
        return None if report == Deaths() else report

    async def hold(self) -> None:
        """Note that the step waits: if its worker dies now, the step is not the cause."""
        self.is_held = self._was_held = True
        await self.confirm()

    async def confirm(self) -> None:
        """Send the next heartbeat, and return when the cluster has it. The SDK sends its own at times of its choice."""
        beat = self._beat()
        self._context.run(activity.heartbeat, beat)  # replaces an older one that the SDK has not sent yet
        handle = self._cluster.client.get_async_activity_handle(task_token=self._token)

        async def send() -> None:
            async with self._cluster.rpc_scope(missing_ok=True):
                with contextlib.suppress(AsyncActivityCancelledError):  # the SDK reports it too
                    await handle.heartbeat(beat)

        await self._cluster.answered(send)


class Gate(Quarantine):
    """Which steps may begin in a worker; see ``Quarantine``.

    Suspects come one by one. So a group is put together when it starts, from those that are there.
    """

    def __init__(self, max_recoveries: int) -> None:
        super().__init__(Executing())
        self._max_recoveries = max_recoveries
        #: the suspects in this worker that have not ended, with their numbers of deaths
        self._suspects: dict[str, int] = {}
        #: what the cluster takes to be alone in this worker
        self._alone: Suspicion | None = None
        self._declaring = asyncio.Lock()
        self._checking: asyncio.Task[None] | None = None

    def is_proven(self, suspicion: Suspicion) -> bool:
        return suspicion.is_proven(self._max_recoveries)

    @property
    def is_busy(self) -> bool:
        """Whether suspects must wait for the end of what was executed here before them."""
        return not self._admitted and len(self._executing) > 0

    def arrive(self, key: str, suspicion: Suspicion) -> None:
        """Call it before a step is executed."""
        if not suspicion.is_suspect:
            return
        if not self._held_back:
            self._since = anyio.current_time()
        self._suspects[key] = suspicion.deaths
        self._held_back.add(key)
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._check())

    async def wait_for_turn(self, key: str) -> None:
        while not self.is_open_to(key):
            await self._changed.wait()

    async def start(self, key: str, suspicion: Suspicion) -> None:
        """Call it when a step begins, at a time when the gate is open to it."""
        self.begin(key)
        suspicion.is_held = False
        if self._alone is None and not suspicion.must_confirm:
            return
        async with self._declaring:
            await self._withdraw()
            if suspicion.must_confirm:
                if len(self._executing) == 1:
                    self._alone, suspicion.is_alone = suspicion, True
                await suspicion.confirm()

    async def leave(self, key: str, suspicion: Suspicion) -> None:
        """Call it when a step is not executed any more."""
        try:
            if self._alone is suspicion:
                async with self._declaring:
                    if self._alone is suspicion:
                        await self._withdraw()
        finally:
            self.end(key)
            if self._suspects.pop(key, None) is not None:
                self._held_back.discard(key)
                if not self._held_back and not self._admitted:
                    self._close(False)

    async def _withdraw(self) -> None:
        """Let the cluster know that nothing is alone here any more, before something else is executed."""
        if self._alone is not None:
            self._alone.is_alone = False
            await self._alone.confirm()
            self._alone = None

    async def _check(self) -> None:
        while self._suspects or self._admitted:
            await asyncio.sleep(CHECK_S)
            if self._admitted or anyio.current_time() >= self._since + GATHER_S:
                self.check()

    def _next_group(self) -> SuspectGroup | None:
        """Return those with the most deaths: a quarter of all suspects, and with each death a quarter of that."""
        if not self._held_back:
            return None
        first, *_ = waiting = sorted(self._held_back, key=lambda key: -self._suspects[key])
        deaths = self._suspects[first]
        group = waiting[: max(1, len(self._suspects) // GROUPS ** (deaths - 1))]
        template = "%d of %d suspects start, with nothing beside them: their workers died up to %d times"
        logger.warning(template, len(group), len(self._suspects), deaths)
        return SuspectGroup(group, life_s(deaths))

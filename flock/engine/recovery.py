"""Recovery: an engine takes over the unfinished work of those whose process has died."""

import logging
from collections.abc import Callable, Collection

import anyio

from flock.engine.batches import Batches
from flock.engine.runner import Runner
from flock.fair import FairShare
from flock.runs import Run, now
from flock.steps.outcomes import CRASHED, log_crash
from flock.store.port import TakenOver

logger = logging.getLogger("flock.runs")

#: How long a busy engine leaves suspects to one that executes nothing, such as that of a new worker, in seconds.
LEAVE_S = 10.0


class Recovery:
    """Takes over work for one engine.

    Args:
        agents: those that it has.
        flock: its own.
        start: starts a run.
        start_task: starts a function with arguments in a new task, unless the engine is shutting down.
    """

    def __init__(
        self,
        runner: Runner,
        batches: Batches,
        agents: Collection[str],
        flock: str,
        engine_id: str,
        start: Callable[[Run], None],
        start_task: Callable[..., object],
    ) -> None:
        self._runner, self._batches, self._store = runner, batches, runner.store
        self._agents, self._flock, self._engine_id = agents, flock, engine_id
        self._start, self._start_task = start, start_task
        #: by dead engine: the agents that its remaining runs need, which this engine does not have
        self._missing_agents: dict[str, Collection[str]] = {}
        #: the dead engines whose suspects are left to others, and until when
        self._left: dict[str, float] = {}

    async def warn_of_others(self, differences: str) -> None:
        """Warn if other programs use the store, or other users can read it. This may be unintentional."""
        if self._store.is_public:
            template = "Every user of this machine can read the store %s. To change that, run: chmod go= %s*"
            logger.warning(template, self._store.path, self._store.path)
        if differences:
            logger.warning(
                "The store %s was last used by a flock with the same name, %r, %s. If that is another program, both "
                "see each other's runs, and each resumes those of the other after a crash. Give one of them another "
                "name, Flock(name), or another store (store=, --store).",
                *(self._store.path, self._flock, differences),
            )
        for name, count in (await self._store.unfinished_of_other_flocks(self._flock)).items():
            logger.warning(
                "The store %s has %d unfinished runs and batches of the flock %r. This flock, %r, does not execute "
                "them. To give it a separate store, use store= or --store.",
                *(self._store.path, count, name, self._flock),
            )

    async def take_over(self) -> None:
        """Take over unfinished runs and batches of dead engines, if this engine has their agents."""
        dead = await self._store.dead_engines(self._flock, self._engine_id)
        self._missing_agents = {dead_id: names for dead_id, names in self._missing_agents.items() if dead_id in dead}
        self._left = {dead_id: until for dead_id, until in self._left.items() if dead_id in dead}
        taken = []
        try:
            for dead_id in dead:
                names = self._missing_agents.get(dead_id)
                if (names is None or any(name in self._agents for name in names)) and not await self._leaves(dead_id):
                    taken.append(await self._take_over_from(dead_id))
        finally:  # also if another one cannot be taken over
            await self._resume(*taken)

    async def _leaves(self, dead_id: str) -> bool:
        """Whether to leave a dead engine to an engine that executes nothing, since its suspects may kill that too."""
        if not len(self._store.executing) or not await self._store.may_have_suspects(dead_id):
            return False
        at = anyio.current_time()
        return at < self._left.setdefault(dead_id, at + LEAVE_S)

    async def take_over_cancelled(self, id_: str, owner: str | None) -> None:
        """Take over a cancelled run or batch of a dead engine, so that it ends even if no program has its agent."""
        if owner is not None and owner in await self._store.dead_engines(self._flock, self._engine_id):
            await self._store.take_over(
                owner, self._engine_id, now(), self._runner.limits.max_recoveries, only=id_, then=self._resume_soon
            )

    async def _take_over_from(self, dead_id: str) -> TakenOver:
        taken = await self._store.take_over(dead_id, self._engine_id, now(), self._runner.limits.max_recoveries)
        known = self._missing_agents.pop(dead_id, ())
        if not taken.is_complete:
            self._missing_agents[dead_id] = taken.missing.keys()
        if not taken.missing.keys() <= set(known):
            logger.warning(
                "The store %s has unfinished runs of agents that this program does not have: %s. They wait until a "
                "program that has these agents is started. You can also cancel them.",
                self._store.path,
                ", ".join(f"{name} ({count})" for name, count in taken.missing.items()),
            )
        return taken

    def _resume_soon(self, taken: TakenOver) -> None:
        self._start_task(self._resume, taken)

    async def _resume(self, *all_taken: TakenOver) -> None:
        """Start what was taken over. Cancellation: what is not started yet is left to another engine."""
        self._runner.quarantine.add([group for taken in all_taken for group in taken.suspects])
        for taken in all_taken:
            ended = [run for run in taken.runs if run.status.is_final]
            runs = [run for run in taken.runs if not run.status.is_final]
            if ended or runs or taken.batches:
                template = "resuming %d runs and %d batches of an engine that has stopped; %d of its runs were ended"
                logger.info(template, len(runs), len(taken.batches), len(ended))
            for batch in taken.batches:
                self._batches.resume(batch)
            share = FairShare()
            for run in runs:
                self._start(run)
                await share.checkpoint()
            for run in ended:
                if run.error_type == CRASHED.error_type:
                    log_crash(run, run.deaths)
                self._runner.executor.notify("run_ended", run)
                await share.checkpoint()

"""What all measures share: the servers that are running, how long to measure, and the rows that come out."""

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from bench.machine import Cores
from bench.servers import BARE, KEY_AND_METRICS, POWER, PRINCIPAL, Server, providing, serving
from bench.stores import fill, some_run_ids

#: One figure for each round, for each subject.
Figures = Mapping[str, Sequence[float]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table.

    Attributes:
        bases: the subjects that each figure is compared with, in the same round. The ratio to the first one is beside
            the figure, and those to the others are in rows of their own.
    """

    title: str
    figures: Figures
    bases: Sequence[str] = (BARE,)


def empty(names: Sequence[str]) -> dict[str, list[float]]:
    return {name: [] for name in names}


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How long to measure, and how much.

    Attributes:
        rounds, seconds: of requests.
        few_rounds: of what takes seconds each time.
        stored: runs in the stores on disk.
        batches: pairs of a number of items and of rounds.
    """

    rounds: int = 5
    seconds: float = 0.3
    few_rounds: int = 2
    stored: int = 1_000_000
    connections: int = 32
    wake_s: float = 1.5
    batches: Sequence[tuple[int, int]] = ((1_000, 5), (100_000, 1), (1_000_000, 1))
    csv_rows: int = 20_000
    pieces: int = 100
    running: int = 1_000
    waiters: int = 10_000
    questions: int = 5_000


QUICK = Effort(
    rounds=2,
    seconds=0.2,
    few_rounds=1,
    stored=2_000,
    wake_s=0.5,
    batches=((1_000, 1),),
    csv_rows=500,
    pieces=20,
    running=100,
    waiters=200,
    questions=200,
)


class Bench:
    """The servers that are running. Each is started when it is first needed, and then runs until the end."""

    def __init__(self, folder: Path, cores: Cores, effort: Effort, stack: contextlib.ExitStack) -> None:
        self.folder, self.cores, self.effort = folder, cores, effort
        self._stack = stack
        self._servers: dict[str, Server] = {}
        self._run_ids: dict[str, list[str]] = {}
        self._provider = ""

    @property
    def provider(self) -> str:
        """The address of the fake model provider."""
        self._provider = self._provider or self._stack.enter_context(providing(self.cores, self.folder))
        return self._provider

    def server(self, name: str) -> Server:
        if name not in self._servers:
            if name in (POWER, KEY_AND_METRICS):
                shutil.copyfile(self._filled_store(PRINCIPAL if name == KEY_AND_METRICS else None), self.store_of(name))
            self._servers[name] = self._stack.enter_context(self.fresh(name, store=f"{name}.db"))
        return self._servers[name]

    def _filled_store(self, principal: str | None) -> Path:
        path = self.store_of("filled" if principal is None else f"filled-for-{principal}")
        if not path.exists():
            fill(path, self.effort.stored, principal)
        return path

    def store_of(self, name: str) -> Path:
        return self.folder / f"{name}.db"

    def run_ids(self, name: str, count: int) -> list[str]:
        """Return the ids of runs with which the store of a server on disk was filled. They are always the same."""
        self.server(name)
        if name not in self._run_ids:
            self._run_ids[name] = some_run_ids(self.store_of(name), count)
        return self._run_ids[name]

    def fresh(self, name: str, *options: str, store: str = "fresh.db") -> contextlib.AbstractContextManager[Server]:
        """Serve *name* in the block, beside the server that may be running."""
        return serving(name, self.cores, self.folder, *options, store=store, provider=self.provider)

    def turns(self, names: Sequence[str], rounds: int) -> Iterator[str]:
        """Yield each name once in each round. The order rotates, so that it does not matter."""
        for number in range(rounds):
            first = number % len(names)
            yield from itertools.chain(names[first:], names[:first])

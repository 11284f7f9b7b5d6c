"""Which runs a process was executing when it died, and in which groups those that may have killed it start again."""

import contextlib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from flock.scopes import running_loop

#: The length of a line of ``Executing``: the number of a group, and the id of a run.
LINE_BYTES = 64
#: Into how many groups suspects are divided. With two, the process would die twice as often until one run is left.
GROUPS = 4
#: How long a group has to live after its second death before the next one starts, in seconds, and the longest time.
FIRST_LIFE_S, MAX_LIFE_S = 1.0, 512.0


class Executing:
    """The runs that this process is executing. Its lock file lists them for the engine that takes over after its death.

    What is written survives the death of the process, but not a power cut, after which the boot id differs.

    Attributes:
        group: the number of the newest group of suspects that has started here.
    """

    def __init__(self) -> None:
        self.group = 0
        self._file: IO[bytes] | None = None
        self._lines: dict[str, int] = {}
        self._free: list[int] = []
        #: the lines of runs that have ended in this turn of the event loop
        self._ended: set[int] = set()

    def __len__(self) -> int:
        return len(self._lines)

    def open(self, file: IO[bytes]) -> None:
        """Write to *file*, which is empty."""
        self._file = file
        self._ended.clear()  # the event loop may have ended before they were erased
        self._write(0, _boot_id())
        for run_id, line in self._lines.items():
            self._write(line, f"{self.group} {run_id}")

    def forget(self) -> None:
        """Clear the list: the process was asked to stop, so none of its runs is to blame."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError, ValueError):
                os.ftruncate(file.fileno(), 0)

    def begin(self, run_id: str) -> None:
        if run_id not in self._lines:
            line = self._lines[run_id] = self._free.pop() if self._free else len(self._lines) + 1
            self._ended.discard(line)
            self._write(line, f"{self.group} {run_id}")

    def end(self, run_id: str) -> None:
        """Erase its line in the next turn of the event loop, unless a run that begins before that takes it.

        Erase it at once if one run is left: if that kills the process, it must stand alone in the file.
        """
        if (line := self._lines.pop(run_id, None)) is None:
            return
        self._free.append(line)
        self._ended.add(line)
        if (loop := running_loop()) is None or len(self._lines) == 1:
            self._erase()
        elif len(self._ended) == 1:
            loop.call_soon(self._erase)

    def _erase(self) -> None:
        while self._ended:
            self._write(self._ended.pop(), "")

    def _write(self, line: int, text: str) -> None:
        if self._file is not None:
            try:
                os.pwrite(self._file.fileno(), text.encode().ljust(LINE_BYTES - 1) + b"\n", line * LINE_BYTES)
            except (OSError, ValueError):  # such as a full disk: a death of the run is not counted
                pass


def _boot_id() -> str:
    """Return an id of this start of the machine, or "-" if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "-"


def executed_until_death(path: str) -> Mapping[str, int]:
    """Return the runs that the process with the lock file *path* was executing when it died, each with its group.

    There are none if it stopped because it was asked to, or if the machine was restarted.
    """
    try:
        boot, *lines = Path(path).read_text().splitlines()
    except (OSError, ValueError):
        return {}
    if boot.strip() != _boot_id():
        return {}
    pairs = [line.split() for line in lines]
    return {pair[1]: int(pair[0]) for pair in pairs if len(pair) == 2 and pair[0].isdigit()}


class SuspectGroup(NamedTuple):
    """Suspects that start together, and how long they have to live before others may start beside them, in seconds."""

    run_ids: Collection[str]
    life_s: float


def groups_of(suspects: Mapping[str, int], executed: Mapping[str, int]) -> Sequence[SuspectGroup]:
    """Divide *suspects*, given with their numbers of deaths, into the groups in which they are executed.

    First those of the newest group that was executed at the last death, since the others had lived beside each other
    before; then those others; then the ones that had not started. So each death leaves a quarter.
    """
    newest = max((executed[run_id] for run_id in suspects if run_id in executed), default=0)
    circles: list[list[str]] = [[], [], []]
    for run_id in sorted(suspects, key=lambda run_id: -suspects[run_id]):
        circles[2 if run_id not in executed else executed[run_id] != newest].append(run_id)
    groups = []
    for circle in circles:
        size = max(1, math.ceil(len(circle) / GROUPS))
        groups += [circle[start : start + size] for start in range(0, len(circle), size)]
    return [SuspectGroup(group, life_s(min(suspects[run_id] for run_id in group))) for group in groups]


def life_s(deaths: int) -> float:
    """Return how long suspects have to live after so many deaths, in seconds."""
    return min(MAX_LIFE_S, FIRST_LIFE_S * 2.0 ** min(deaths - 2, 32))

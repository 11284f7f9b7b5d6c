"""Which core runs what, and what a process has used. Linux only: CPU time and memory are read from /proc."""

import os
import re
import time
from pathlib import Path

import msgspec


class Cores(msgspec.Struct, frozen=True):
    """The server has one core, and the load generator and the fake provider have another one. None means all."""

    server: int | None
    load: int

    @property
    def are_different(self) -> bool:
        return self.server != self.load


def pick_cores() -> Cores:
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(server=allowed[-1], load=allowed[0])


def cpu_s(pid: int) -> float:
    """Return the CPU time of all threads of a process and its children so far, user and kernel."""
    clock = ~pid << 3 | 2  # clock_getcpuclockid(3): /proc/PID/stat has steps of 10 ms
    return time.clock_gettime(clock) + sum(map(cpu_s, children_of(pid)))


def children_of(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def descendants_of(pid: int) -> list[int]:
    return [each for child in children_of(pid) for each in (child, *descendants_of(child))]


def memory_kb(pid: int) -> float:
    """Return the memory of a process. Pages that it shares with others count in part."""
    return _field(pid, "smaps_rollup", "Pss")


def peak_kb(pid: int) -> float:
    """Return the most memory that a process has had since ``forget_peak``."""
    return _field(pid, "status", "VmHWM")


def forget_peak(pid: int) -> float:
    """Return the memory of a process now, from which ``peak_kb`` then begins."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _field(pid, "status", "VmRSS")


def _field(pid: int, file: str, name: str) -> float:
    found = re.search(rf"(?m)^{name}: +(\d+) kB", Path(f"/proc/{pid}/{file}").read_text().replace("\t", " "))
    if found is None:
        raise RuntimeError(f"/proc/{pid}/{file} has no {name}.")
    return int(found[1])

"""Code that tests share. Only ``browser`` imports Playwright, and ``cluster`` imports temporalio when it is called."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
#: How long a test waits for something that must happen, in seconds. It is long because a busy machine is slow.
PATIENCE_S = 100
#: Processes of a server. Most tests of a limit only run with one of them before a merge.
WORKERS = [1, pytest.param(2, marks=pytest.mark.nightly)]


def slowness() -> float:
    """Return how many times as long as alone this thread takes now, because others use the processors. At least 1.

    A bound that holds for an idle machine is multiplied by it.
    """
    cpu_s, began_s, cpu_began_s = 0.1, time.monotonic(), time.thread_time()
    while time.thread_time() - cpu_began_s < cpu_s:
        pass
    return max(1.0, (time.monotonic() - began_s) / cpu_s)


@contextlib.contextmanager
def slowness_meanwhile() -> Iterator[list[float]]:
    """Add the ``slowness`` to the list that it yields, again and again until the block ends, since it changes."""
    found, is_over = [slowness()], threading.Event()

    def measure() -> None:
        while not is_over.wait(0.2):
            found.append(slowness())

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def open_files() -> set[str]:
    """Return the number and the name of each file that this process has open.

    Sockets are left out, since clients of other tests may connect again at any moment, in threads of their own.
    """
    folder, found = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd", set[str]()
    for number in os.listdir(folder):
        with contextlib.suppress(OSError):
            found.add(f"{number} {os.readlink(f'{folder}/{number}')}")
    return {each for each in found if " socket:" not in each}

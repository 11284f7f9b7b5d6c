"""Crash points: a real server is killed before each system call that writes, syncs, renames, sends or receives.

Or stopped for a while; or the call fails, also those of SQLite itself, and the server must go on.

python -m tests.proof.crash                     every call of every scenario, some hours
python -m tests.proof.crash --points 200        a sample
python -m tests.proof.crash chain --at 17       one of them
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tests.proof.client import PATIENCE_S
from tests.proof.mutations import mutated
from tests.proof.promises import check
from tests.proof.scenarios import SCENARIOS, Client, provider
from tests.proof.servers import Forge, Place
from tests.support import ROOT

Kind = Literal["start", "kill", "worker", "stop", "stopped worker", "error"]
#: How a call fails: with its first or second error in ``calls.c``; of those for files, also all others for a second.
Error = Literal["first", "second", "first for a second", "second for a second"]
ERRORS: Mapping[Error, int] = {"first": -1, "second": -2, "first for a second": -3, "second for a second": -4}
#: How long a process is stopped: longer than others wait for the lock of the store, or for a sign of life.
STOPS_S = (6.0, 32.0)
CAPACITY = 3
#: Scenarios are played on one store, one after the other, this often.
PLAYS_OF_A_STORE = 12


class Point(NamedTuple):
    """Before which call of a scenario the process gets the signal, or which one fails, counted from its start.

    "start" is counted from the start of the server, with a new store.
    """

    scenario: str
    kind: Kind
    at: int
    error: Error = "first"

    @property
    def command(self) -> str:
        error = f" --error '{self.error}'" if self.kind == "error" else ""
        return f"python -m tests.proof.crash {self.scenario} --kind '{self.kind}'{error} --at {self.at}"


class Broken(AssertionError):
    """A promise is broken, at a point."""


class Machine:
    """Servers in which scenarios are played, with a signal before one of their calls.

    Attributes:
        reached: how many signals were sent, by kind.
    """

    def __init__(self, forge: Forge) -> None:
        self._forge, self._stack = forge, contextlib.ExitStack()
        self._model, self._env = self._stack.enter_context(provider())
        self._left, self._options, self._idle = 0, tuple[str, ...](), dict[int, dict[str, int]]()
        self._on_store = contextlib.ExitStack()
        self.reached = Counter[str]()

    def close(self) -> None:
        self._on_store.close()
        self._stack.close()

    def _open(self, point: Point) -> None:
        """Use the store of earlier points, or a new one."""
        own, workers = SCENARIOS[point.scenario].options, _workers_of(point)
        options = ("--max-concurrency", str(CAPACITY), "--workers", str(workers), *own)
        if self._left and options == self._options and point.kind != "start":
            self._left -= 1
            return
        self._on_store.close()
        self._left, self._options = 0 if own else PLAYS_OF_A_STORE, options
        self._place = self._on_store.enter_context(Place(self._forge, self._env, *options))
        self._model.requests.clear()
        self._client = Client(self._place.url)
        self._on_store.callback(self._client.close)
        if point.kind == "start":
            self._place.control.signal_at(point.at)
        self._place.start()
        if point.kind != "start":
            self._place.wait_until_up()
            if workers not in self._idle:
                while len(self._place.held()["locks"]) < workers:
                    time.sleep(0.1)
                time.sleep(1)  # until each worker has all its threads and files
                idle = {what: len(each) for what, each in self._place.held().items()}
                # A pool keeps threads. SQLite opens a journal late, and keeps the file of a closed connection.
                more = {"threads": idle["threads"] + CAPACITY * workers, "files": idle["files"] + 2 * workers}
                self._idle[workers] = {**idle, **more, "connections": 0}

    def calls_of(self, scenario: str) -> int:
        """Return how many calls there are from the start of a scenario to its end."""
        self._open(Point(scenario, "kill", 0))
        before = self._place.control.count
        SCENARIOS[scenario].play(self._client)
        return self._place.control.count - before

    def calls_at_start(self) -> int:
        with Place(self._forge, self._env) as place:
            place.start()
            place.wait_until_up()
            return place.control.count

    def play(self, point: Point) -> None:
        """Play a scenario. Raises Broken."""
        self._open(point)
        place, control = self._place, self._place.control
        if point.kind != "start":
            control.signal_at(point.at, self._signal_of(point))
        is_over = threading.Event()
        helper = threading.Thread(target=self._help, args=[point, is_over])
        helper.start()
        try:
            try:
                SCENARIOS[point.scenario].play(self._client)
            finally:
                control.disarm()
                is_over.set()
                helper.join()
            workers = _workers_of(point)
            capacity = 0 if SCENARIOS[point.scenario].options else CAPACITY  # its runs would be removed
            check(self._client, self._model, place.log, capacity=capacity, workers=workers)
            if workers in self._idle:
                self._check_held(self._idle[workers])
        except Exception as exc:
            self._left = 0
            log = "\n".join(place.output.read_text().splitlines()[-30:])
            where = " < ".join(
                f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(exc.__traceback__)[::-1]
            )
            raise Broken(f"{point}: {exc!r} at {where}\nTo repeat it: {point.command}\n{log}") from exc
        self.reached[point.kind] += control.pid > 0

    def _signal_of(self, point: Point) -> int:
        if point.kind == "error":
            return ERRORS[point.error]
        return signal.SIGSTOP if "stop" in point.kind else signal.SIGKILL

    def _check_held(self, idle: Mapping[str, int]) -> None:
        """Check that the server holds no more files, threads and connections than one that has just been started."""
        deadline = time.monotonic() + PATIENCE_S
        while held := {what: each for what, each in self._place.held().items() if len(each) > idle[what]}:
            assert time.monotonic() < deadline, f"the server still holds {held}, and at first {idle}"
            time.sleep(0.01)

    def _help(self, point: Point, is_over: threading.Event) -> None:
        """Start a killed server again, and continue a stopped one, also if that is at the end of the scenario."""
        place, deaths, continues_at, is_replaced = self._place, self._client.deaths, 0.0, False
        while not (is_over.wait(0.005) and (not place.control.pid or is_replaced)):
            pid = place.control.pid
            if "stop" in point.kind:
                if pid and not continues_at:
                    continues_at = time.monotonic() + STOPS_S[point.at % 2]
                elif continues_at and time.monotonic() >= continues_at:
                    os.kill(pid, signal.SIGCONT)
                    is_replaced = True
            elif pid and not is_replaced and point.kind == "error":
                deaths += [place.control.signalled_at] if place.control.is_network else []  # an answer may be lost
                is_replaced = True
            elif pid and not is_replaced and point.kind == "worker":
                deaths.append(place.control.signalled_at)  # the other one takes over its runs
                is_replaced = True
            elif pid and not is_replaced and place.has_died():
                place.kill()
                deaths.append(place.control.signalled_at)
                place.start()
                is_replaced = True


def _workers_of(point: Point) -> int:
    return 2 if "worker" in point.kind else 1


def points_of(machine: Machine, scenarios: Collection[str], kinds: Collection[Kind]) -> list[Point]:
    points = [Point("function", "start", at + 1) for at in range(machine.calls_at_start() if "start" in kinds else 0)]
    for scenario in scenarios:
        ats = range(1, machine.calls_of(scenario) + 1)
        points += [Point(scenario, kind, at) for kind in kinds if kind != "start" for at in ats]
    return points


def with_errors(points: Collection[Point], seed: int, error: Error | None = None) -> list[Point]:
    """Return the points with how their calls fail: as *error* says, or the seed."""
    rng = random.Random(f"{seed} errors")
    return [point._replace(error=rng.choice(list(ERRORS)) if error is None else error) for point in points]


def execute(
    scenarios: Collection[str],
    kinds: Collection[Kind],
    count: int | None = None,
    seed: int = 0,
    package: Path = ROOT,
    at: int | None = None,
    error: Error | None = None,
) -> tuple[Counter[str], list[Broken]]:
    """Play scenarios with a signal at each point, or at *count* of them. Return how many were reached, and what fails.

    Args:
        package: the folder of another copy of the product.
        at: only before this call.
        error: how each call fails. By default, the seed takes one for each.
    """
    broken = list[Broken]()
    with Forge(package) as forge, contextlib.closing(Machine(forge)) as machine:
        if at is None:
            points = points_of(machine, scenarios, kinds)
        else:
            points = [Point(scenario, kind, at) for scenario in scenarios for kind in kinds]
        if count is not None and count < len(points):
            points = random.Random(seed).sample(points, count)
        for point in sorted(with_errors(points, seed, error), key=lambda point: point.kind):  # of one kind on one store
            try:
                machine.play(point)
            except Broken as exc:
                broken.append(exc)
                print(exc, flush=True)
        return machine.reached, broken


#: The scenarios that take less than seconds.
SHORT = [name for name, each in SCENARIOS.items() if not each.is_long]


def main() -> None:  # pragma: no cover - run by hand
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="*", help=", ".join(SCENARIOS))
    parser.add_argument("--kind", choices=get_args(Kind), action="append")
    parser.add_argument("--error", choices=ERRORS, help="how each call fails; by default, the seed takes one for each")
    parser.add_argument("--at", type=int, metavar="N")
    parser.add_argument("--points", type=int, metavar="COUNT", help="a sample of all points")
    parser.add_argument("--seed", type=int, default=0, help="of the sample, and of the errors")
    parser.add_argument("--mutation", type=Path, metavar="PATCH", help="change the product before")
    chosen = parser.parse_args()
    began_s = time.monotonic()
    with mutated(chosen.mutation) if chosen.mutation else contextlib.nullcontext(ROOT) as package:
        kinds = chosen.kind or ["start", "kill", "worker"]
        scenarios, error = chosen.scenario or SHORT, chosen.error
        reached, broken = execute(scenarios, kinds, chosen.points, chosen.seed, package, chosen.at, error)
    print(f"{dict(reached)} points reached in {time.monotonic() - began_s:.0f} s, {len(broken)} broken")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()

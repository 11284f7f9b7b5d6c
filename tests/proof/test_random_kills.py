"""Random workflow programs on real engines, whose processes are killed (kill -9) at random moments.

A process writes what its programs do to a log, and the same checks read it as of random programs in virtual time.
Some runs are cancelled, and some of those that have failed or were cancelled are retried.
``KILLS`` is how often a process is killed. A program with time-outs may go another way after a kill, since no journal
knows how late one was: only its effects are compared.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from msgspec.structs import replace

from flock.runs import RunStatus, new_id
from tests.proof.generator import CLASSES, End, Fate, program_of
from tests.proof.workflows import path_to, text
from tests.proof.world import Life, World
from tests.support import PATIENCE_S, ROOT
from tests.test_kills import KILLS, LIVES_S, kill, one_server, workers
from tests.test_kills import Life as Process

pytestmark = pytest.mark.nightly

#: How many programs are started after each kill.
PROGRAMS = 12
POLL_S = 0.2
NAMES = list(CLASSES)
#: Not the first process, nor the order of asyncio.
SOME = End(0, 0)
FATE = Fate(seed=1, is_stored=True, ends=(SOME,))

SCRIPT = """
import contextlib
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, ROOT)

from flock.runs import RunContext, new_id
from tests.proof.workflows import FLOCK as flock
from tests.proof.workflows import LIFE, MODEL, Statement, Walk

MODEL.__enter__()
flock.name = NAME
LOG = os.open("lives.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)


class Life:
    def __init__(self, run_id):
        self.ids, self.bodies, self.begun = (run_id, new_id()), {}, Counter()
        self.attempt = 1 + len(list(Path().glob(f"retried-{run_id}-*")))

    def note(self, what, at="", value=None):
        os.write(LOG, msgspec.json.encode([*self.ids, what, at, value]) + b"\\n")

    def random_s(self, seconds):
        return seconds * random.uniform(0.5, 1)

    def saw(self, at, outcome, statement):
        self.note("saw", at, outcome)

    def decided(self, at, decision):
        self.note("decided", at, decision)

    def waits(self, at, statement):
        self.note("waits", at)

    def waited(self, at, seconds):
        pass

    def cancelled(self, at):
        self.note("cancelled", at)

    def cut_off(self, at):
        self.note("cut_off", at)

    @contextlib.contextmanager
    def executing(self, at, effect):
        self.begun[at] += 1
        self.note("executing", at)
        yield self.begun[at] <= 1


@flock.agent
async def main(program: str, context: RunContext) -> Any:
    LIFE.set(life := Life(context.run_id))
    life.note("begins")
    try:
        return await Walk(life, context).do(msgspec.json.decode(program, type=Statement), "0")
    finally:
        life.note("is over")
"""


class Log:
    """What the programs have done, as their processes have noted it: each run has a ``World``."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._lives = path, 0, dict[str, Life]()
        self.worlds = dict[str, World]()
        #: the messages that runs wait for and that are not sent, each with its run and name
        self.to_send = list[tuple[str, str, int]]()
        #: the runs to cancel at a random moment, and when the last attempt of each has ended
        self.to_cancel, self.ends = set[str](), dict[str, str]()
        #: the runs that have ended, and are not retried
        self.over = set[str]()

    def read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    self._note(*msgspec.json.decode(line))

    def should_retry(self, run: Any) -> bool:
        """Check an attempt that has ended. Whether it is to be retried, which its next lives then know."""
        self.ends[run["run_id"]] = run["completed_at"]
        world, fields = self.worlds[run["run_id"]], {"error": run["error"], "error_type": run.get("error_type")}
        ended: Any = SimpleNamespace(status=RunStatus(run["status"]), value=run["result"], **fields)
        if not world.should_retry(ended):
            return False
        (self._path.parent / f"retried-{run['run_id']}-{world.attempt}").touch()
        return True

    def _note(self, run_id: str, life_id: str, what: str, at: str, value: Any) -> None:
        world = self.worlds[run_id]
        if what == "begins":
            self._lives[life_id] = world.new_life()
        life, (_, statement) = self._lives[life_id], path_to(world.program, at)[-1]
        match what:
            case "saw":
                life.saw(at, value, statement)
            case "decided":
                life.decided(at, value)
            case "waits" if statement.kind == "receive" and statement.comes != "never":
                self.to_send.append((run_id, f"to-{at}", statement.n))
            case "cancelled":
                life.cancelled(at)
            case "cut_off":
                life.cut_off(at)
            case "executing":
                with life.executing(at, statement):
                    pass
            case "is over":
                life.is_over = True


@pytest.mark.timeout(240 + 30 * KILLS)
@pytest.mark.parametrize("engine", LIVES_S)
def test_what_is_done_stays_done_in_real_processes(engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    script, log = tmp_path / "programs.py", Log(tmp_path / "lives.log")
    script.write_text(SCRIPT.replace("ROOT", repr(str(ROOT))).replace("NAME", repr(f"programs {new_id()}")))
    chance, kills = random.Random(engine), list[float]()
    lives = (
        workers(script, request.getfixturevalue("temporal_address"))
        if engine == "temporal"
        else one_server(script, tmp_path)
    )
    with lives as start_life:
        for number in range(KILLS):
            life_s = chance.uniform(0.05, chance.choice(LIVES_S[engine]))
            with start_life() as process, httpx.Client(base_url=process.url, timeout=60) as client:
                _start(client, log, range(number * PROGRAMS, (number + 1) * PROGRAMS))
                killer = threading.Timer(life_s, kill, [process.pid, kills])
                killer.start()
                with contextlib.suppress(httpx.TransportError):  # the server has just been killed
                    _help(client, log, chance, until=time.monotonic() + life_s)
                killer.join()
        _end(start_life, log, chance)
    problems = [
        f"{'; '.join(world.problems)}\n{text(world.program)}" for world in log.worlds.values() if world.problems
    ]
    assert not problems, "\n\n".join([f"{len(problems)} of {len(log.worlds)}", *problems])
    effects = sum(world.begun.total() for world in log.worlds.values())
    attempts = sum(world.attempt for world in log.worlds.values())
    print(f"{engine}: {len(kills)} kills, {len(log.worlds)} programs, {attempts} attempts, {effects} effects")


def _start(client: httpx.Client, log: Log, numbers: Sequence[int]) -> None:
    for number in numbers:
        chance = random.Random(number)
        program = program_of(chance, CLASSES[NAMES[number % len(NAMES)]])
        fate = replace(FATE, retries=chance.randint(0, 2), cancel=None if chance.randint(0, 3) else SOME)
        inputs = {"program": msgspec.json.encode(program).decode()}
        body = {"agent_name": "main", "inputs": inputs, "async_run": True}
        run_id = _answered(client, "POST", "/run/flock", json=body)["run_id"]
        log.worlds[run_id] = World(program, fate, saves_take_time=True)
        log.to_cancel |= set() if fate.cancel is None else {run_id}


def _answered(client: httpx.Client, method: str, path: str, **request: Any) -> Any:
    """Return the body of a response. A busy cluster may be too slow for one (503)."""
    while (response := client.request(method, path, **request)).status_code == 503:
        time.sleep(POLL_S)
    return response.json()


def _help(client: httpx.Client, log: Log, chance: random.Random, *, until: float) -> None:
    """Answer questions, send messages, cancel and retry runs until all have ended or the time is over."""
    while len(log.over) < len(log.worlds) and time.monotonic() < until:
        log.read()
        while log.to_send:
            run_id, name, number = log.to_send[-1]
            key = {"Idempotency-Key": f"{run_id}.{name}"}
            _answered(client, "POST", f"/run/{run_id}/messages/{name}", json={"message": number}, headers=key)
            log.to_send.pop()
        for run_id in log.worlds.keys() - log.over:
            if run_id in log.to_cancel and not chance.randint(0, 5):
                log.to_cancel.discard(run_id)
                log.worlds[run_id].stop()
                client.post(f"/run/{run_id}/cancel")
            run = _answered(client, "GET", f"/run/{run_id}")
            if run["completed_at"]:
                log.read()
                if log.ends.get(run_id) != run["completed_at"] and not log.should_retry(run):
                    log.over.add(run_id)
                else:  # perhaps after a process has died before that
                    client.post(f"/run/{run_id}/retry")
            for question in run.get("waiting_for") or ():
                answer = {"output": int(question["question"].partition(" ")[0])}
                client.post(f"/run/{run_id}/calls/{question['call_id']}", json=answer)
        time.sleep(POLL_S)


def _end(start_life: Callable[[], AbstractContextManager[Process]], log: Log, chance: random.Random) -> None:
    """Let all runs end in a last process."""
    with start_life() as process, httpx.Client(base_url=process.url, timeout=60) as client:
        _help(client, log, chance, until=time.monotonic() + 4 * PATIENCE_S)
    open_ = [text(log.worlds[run_id].program) for run_id in log.worlds.keys() - log.over]
    assert not open_, "\n\n".join([f"{len(open_)} have not ended", *open_])

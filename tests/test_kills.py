"""Four programs whose process is killed (kill -9) at random moments: nothing that was done is done again.

On a cluster, the worker is killed. ``KILLS`` is how often the process of each program is killed: 100 times in
``.ci/nightly``.
"""

import asyncio
import contextlib
import hashlib
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from flock.runs import new_id
from tests.support import PATIENCE_S
from tests.support.servers import flockapi_command, running, serving

pytestmark = pytest.mark.nightly

KILLS = int(os.environ.get("KILLS", "10"))
PATIENCE = ("--max-recoveries", str(KILLS + 1))  # these deaths are not the fault of the runs
#: How many runs of a program are started after each kill.
RUNS = 3
SLEEP_S = 6.0
#: How long a process lives at most until it is killed, in seconds: one of these. On a cluster, the next worker starts
#: unfinished steps again some seconds later.
LIVES_S = {"embedded": [1.5], "temporal": [1.5, 9.0]}

SCRIPT = """
import asyncio
import contextlib
import os
import time

from flock.core import Flock
from flock.runs import RunContext

LOG = os.open("effects.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
flock = Flock("FLOCK")


async def effect(run_id: str, name: str, seconds: float = 0.05, fails: bool = False) -> None:
    os.write(LOG, f"{time.time()} begin {run_id} {name}\\n".encode())
    await asyncio.sleep(seconds)
    os.write(LOG, f"{time.time()} end {run_id} {name}\\n".encode())
    if fails:
        raise TimeoutError(name)


async def do(context: RunContext, name: str, *seconds: float, fails: bool = False) -> None:
    with contextlib.suppress(TimeoutError):
        await context.call(effect, context.run_id, name, *seconds, fails=fails)
    os.write(LOG, f"{time.time()} seen {context.run_id} {name}\\n".encode())
    if fails:
        raise TimeoutError(name)


@flock.agent
async def payment(context: RunContext) -> str:
    try:
        await do(context, "charge", fails=True)
    except TimeoutError:
        was_charged = await context.ask("Was it charged?", bool)
        await do(context, "note")
        return str(was_charged)
    return "charged"


@flock.agent
async def saga(context: RunContext) -> str:
    done = []
    try:
        for name in ("flight", "hotel", "car"):
            await do(context, name, fails=name == "car")
            done.append(name)
    except TimeoutError:
        for name in reversed(done):
            await do(context, f"cancel_{name}")
    return ",".join(done)


@flock.agent
async def fan(context: RunContext) -> int:
    async def one(n: int) -> int:
        is_slow = n % 3 == 0
        try:
            async with asyncio.timeout(0.4 if is_slow else 60):
                await do(context, f"work_{n}", 60 if is_slow else 0.02 * n)
        except TimeoutError:
            await do(context, f"late_{n}")
            return 0
        return 1

    return sum(await asyncio.gather(*(one(n) for n in range(36))))


@flock.agent
async def reminder(context: RunContext) -> str:
    await do(context, "begin")
    await context.sleep(SLEEP_S)
    await do(context, "remind")
    paid = await context.receive("payment", int, expires_s=1, default=0)
    if not paid:
        await do(context, "escalate")
        paid = await context.receive("payment", int)
    await do(context, f"thank_{paid}")
    return str(paid)
""".replace("SLEEP_S", str(SLEEP_S))


class Program(NamedTuple):
    """What a run returns, and how often it has each effect. ``lost`` are effects that are cancelled."""

    result: Any
    effects: frozenset[str]
    lost: frozenset[str] = frozenset()


SLOW = frozenset(f"work_{n}" for n in range(0, 36, 3))
PROGRAMS: Mapping[str, Program] = {
    "payment": Program("True", frozenset({"charge", "note"})),
    "saga": Program("flight,hotel", frozenset({"flight", "hotel", "car", "cancel_hotel", "cancel_flight"})),
    "fan": Program(24, frozenset(f"work_{n}" for n in range(36)) | {f"late_{n}" for n in range(0, 36, 3)}, lost=SLOW),
    "reminder": Program("7", frozenset({"begin", "remind", "escalate", "thank_7"})),
}


class Effects:
    """When each effect of each run has begun and ended, and when the program has seen its end."""

    def __init__(self, log: Path) -> None:
        self.begun, self.ended, self.seen = (defaultdict[tuple[str, str], list[float]](list) for _ in range(3))
        noted = {"begin": self.begun, "end": self.ended, "seen": self.seen}
        for line in log.read_text().splitlines() if log.exists() else ():
            at, what, run_id, name = line.split()
            noted[what][run_id, name].append(float(at))


class Life(NamedTuple):
    """A process that executes the program: its id, and where the API is."""

    pid: int
    url: str


@contextlib.contextmanager
def one_server(script: Path, tmp_path: Path) -> Iterator[Callable[[], AbstractContextManager[Life]]]:
    """Yield a function that starts a server with its store in *tmp_path*."""

    @contextlib.contextmanager
    def life() -> Iterator[Life]:
        with serving(script, tmp_path, *PATIENCE) as server:
            yield Life(server.process.pid, server.url)

    yield life


@contextlib.contextmanager
def workers(script: Path, address: str) -> Iterator[Callable[[], AbstractContextManager[Life]]]:
    """Start an API that lives until the end of the block, and yield a function that starts a worker."""
    from tests.test_temporal import working

    @contextlib.contextmanager
    def life() -> Iterator[Life]:
        with working(script, address, options=PATIENCE) as worker:
            yield Life(worker.pid, api.url)

    with running(*flockapi_command("serve", str(script), "--port", "0", "--temporal", address)) as api:
        yield life


@pytest.mark.timeout(60 + 30 * KILLS)
@pytest.mark.parametrize("engine", LIVES_S)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_killed_process_does_nothing_twice(
    name: str, engine: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    script, log = tmp_path / "kills.py", tmp_path / "effects.log"
    script.write_text(SCRIPT.replace("FLOCK", f"kills {new_id()}"))
    chance, paths, kills, acknowledged = random.Random(name), list[str](), list[float](), set[str]()
    lives = (
        workers(script, request.getfixturevalue("temporal_address"))
        if engine == "temporal"
        else one_server(script, tmp_path)
    )
    with lives as start_life:
        for number in range(KILLS + 1):
            is_last = number == KILLS
            with start_life() as life, httpx.Client(base_url=life.url, timeout=60) as client:
                if not is_last:
                    for _ in range(RUNS):
                        body = {"agent_name": name, "inputs": {}, "async_run": True}
                        paths.append(client.post("/run/flock", json=body).headers["Location"])
                if is_last:
                    _help(client, paths, log, acknowledged, until=time.monotonic() + 2 * PATIENCE_S + RUNS * KILLS)
                    runs = _runs(client, paths)
                    break
                life_s = chance.uniform(0.05, chance.choice(LIVES_S[engine]))
                killer = threading.Timer(life_s, kill, [life.pid, kills])
                killer.start()
                try:
                    with contextlib.suppress(httpx.TransportError):  # the server has just been killed
                        _help(client, paths, log, acknowledged, until=time.monotonic() + life_s)
                finally:
                    killer.cancel()  # all runs may have ended before
                    killer.join()
                if len(kills) == number:
                    kill(life.pid, kills)
    program, effects = PROGRAMS[name], Effects(log)
    assert Counter((run["status"], str(run["result"])) for run in runs) == {
        ("completed", str({"result": program.result})): len(paths)
    }, [run["error"] for run in runs if run["error"]]
    repeated = list(_repeated(effects, program))
    assert repeated == [], kills
    if engine == "embedded":
        assert list(_begun_again_by_itself(effects, kills)) == []
    else:  # a cluster also takes a worker for dead that a busy machine has stopped
        replaced = asyncio.run(_replaced(request.getfixturevalue("temporal_address"), runs))
        assert [each for each, begun in effects.begun.items() if len(begun) - 1 > replaced[each[0]]] == [], replaced
    for run in runs:
        found = {effect for run_id, effect in effects.begun if run_id == run["run_id"]}
        assert found == program.effects
    if name == "reminder":
        slept = [effects.begun[run["run_id"], "remind"][0] - effects.ended[run["run_id"], "begin"][-1] for run in runs]
        assert min(slept) > SLEEP_S - 1
    extra = sum(len(at) - 1 for at in effects.begun.values())
    figures = f"{len(kills)} kills, {len(paths)} runs, {len(effects.begun)} effects, {extra} repeated in flight"
    print(f"{name}, {engine}: {figures}")


def kill(pid: int, kills: list[float]) -> None:
    kills.append(time.time())
    os.kill(pid, signal.SIGKILL)


def _runs(client: httpx.Client, paths: Sequence[str]) -> list[Any]:
    """Return the runs that can be read now. Without a worker, a cluster cannot read some, and they are 503."""
    responses = [client.get(path) for path in paths]
    assert {response.status_code for response in responses} <= {200, 503}
    return [response.json() for response in responses if response.status_code == 200]


def _help(client: httpx.Client, paths: list[str], log: Path, acknowledged: set[str], *, until: float) -> None:
    """Answer the questions of the runs, and pay what is escalated, until all have ended or the time is over.

    Args:
        acknowledged: the answers and messages that any process has acknowledged. They are not sent again, so a run
            that has lost one does not end.
    """

    def send(run_id: str, path: str, what: str, body: Any) -> None:
        if (key := f"{run_id} {what}") in acknowledged:
            return
        headers = {"Idempotency-Key": hashlib.sha256(key.encode()).hexdigest()}
        sent = client.post(f"/run/{run_id}/{path}", json=body, headers=headers)
        if sent.is_success:
            acknowledged.add(key)
        else:  # 409: a process was killed after it had stored this
            assert sent.status_code in (409, 503), sent.text

    while time.monotonic() < until:
        runs = _runs(client, paths[-4 * RUNS :])
        if all(run["completed_at"] for run in runs):
            runs = _runs(client, paths)
        for run in runs:
            for question in run.get("waiting_for") or ():
                send(run["run_id"], f"calls/{question['call_id']}", question["question"], {"output": True})
        for run_id, effect in Effects(log).ended:
            if effect == "escalate":
                send(run_id, "messages/payment", "payment", {"message": 7})
        if len(runs) == len(paths) and all(run["completed_at"] for run in runs):
            return
        time.sleep(0.05)


def _repeated(effects: Effects, program: Program) -> Iterator[tuple[str, str, list[float]]]:
    """Yield effects that have begun again although the program had seen their end."""
    for (run_id, name), begun in effects.begun.items():
        seen = effects.seen[run_id, name]
        if name in program.lost:  # it has been cancelled when this one begins
            seen = effects.begun[run_id, name.replace("work", "late")]
        if seen and min(seen) < begun[-1]:
            yield run_id, name, begun


async def _replaced(address: str, runs: Sequence[Any]) -> Mapping[str, int]:
    """Return how many executions of steps were replaced, because their workers were taken for dead, by run."""
    from temporalio.client import Client

    from flock.temporal.messages import run_workflow_id

    client, found = await Client.connect(address), Counter[str]()
    for run in runs:
        history = await client.get_workflow_handle(run_workflow_id(run["run_id"], 1)).fetch_history()
        for event in history.events:
            found[run["run_id"]] += max(0, event.activity_task_started_event_attributes.attempt - 1)
            found[run["run_id"]] += event.HasField("activity_task_timed_out_event_attributes")
    return found


def _begun_again_by_itself(effects: Effects, kills: list[float]) -> Iterator[tuple[str, str, list[float]]]:
    """Yield effects that have begun again although no process was killed."""
    for (run_id, name), begun in effects.begun.items():
        if not all(any(first < at < second for at in kills) for first, second in itertools.pairwise(begun)):
            yield run_id, name, begun

"""Let one operation of a scenario fail, each in turn, and check that all promises hold.

The operations are SQL statements, commits included, calls of the system for files, values that need memory, starts of
threads, reads of the clock, and what is sent to and received from clients and models. The server, its client and its
threads are executed in virtual time (``schedules``), so a trial takes a fraction of a second, and an operation has the
same number each time.

    python -m tests.proof.failing --trials 100
    python -m tests.proof.failing --distinct --trials 0    each error of each distinct operation
"""

import argparse
import asyncio
import contextlib
import errno
import gc
import glob
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx

from flock.errors import StoreError
from flock.web.auth import read_keys
from flockapi import FlockAPI, create_app
from tests.proof import scenarios, shop
from tests.proof.client import KEYS
from tests.proof.faults import ERRORS, Fault, Faults, failing, is_overslept
from tests.proof.promises import check
from tests.proof.scenarios import SCENARIOS, Client, Provider
from tests.proof.schedules import Schedule, Thread, execute
from tests.support import open_files

__all__ = ["distinct", "faults_of", "sample", "trial"]

#: Max runs at the same time. In the end all these slots are free.
CAPACITY = 3
#: How long after a deletion the files of a run are deleted, in seconds.
DELETED_S = 12.0
#: How long operations fail, by kind, if that is not 0 and 3 seconds.
SECONDS = {"model": (0.0,), "value": (0.0,), "clock": (0.0, 3.0, 30.0)}
#: The statement that says what a transaction is for: the next one, or the one before.
BESIDE = {"BEGIN IMMEDIATE": 1, "COMMIT": -1}
#: Of operations, by kind.
Names = Mapping[str, Sequence[str]]


class _Bridge(httpx.BaseTransport):
    """Lets a client that blocks its thread talk to an app in the loop, while others of the loop continue."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.app: Any = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        thread = threading.current_thread()
        assert isinstance(thread, Thread)
        sent = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
        response: httpx.Response = thread.wait_for(self._send(sent))
        if response.status_code >= 500:
            self._check_error(response)
        return response

    async def _send(self, request: httpx.Request) -> httpx.Response:
        is_broken = is_whole = False

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def fragile_send(message: Any) -> None:
                nonlocal is_broken, is_whole
                is_broken = is_broken or self._faults.fail("client")
                if is_broken:
                    raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
                await send(message)
                is_whole = message["type"] == "http.response.body" and not message.get("more_body")

            async def fragile_receive() -> Any:
                return {"type": "http.disconnect"} if is_broken else await receive()

            await self.app(scope, fragile_receive, fragile_send)
            if is_broken:
                raise OSError

        response = await httpx.ASGITransport(app, raise_app_exceptions=False).handle_async_request(request)
        if is_broken:
            raise httpx.WriteError("the connection is broken")
        content = await response.aread()
        if not is_whole:
            raise httpx.ReadError("the response breaks off")
        return httpx.Response(response.status_code, headers=response.headers, content=content)

    def _check_error(self, response: httpx.Response) -> None:
        problem = response.json()
        kind = problem["error"]["code"] if "error" in problem else problem["type"].rpartition(":")[2].replace("-", "_")
        is_clear = kind in ("store_unavailable", "not_running") and "flock.db" not in response.text
        if response.status_code == 500 and kind == "internal_error" and self._faults.lack_memory:
            return
        if response.status_code != 503 or not is_clear or int(response.headers["retry-after"]) < 1:
            self._faults.problems.append(f"an error that is not clear: {response.status_code} {response.text}")
        elif self._faults.rest_s < 0:
            self._faults.problems.append(f"503, though nothing fails: {response.text}")


class _Network(httpx.AsyncBaseTransport):
    """The network to the model."""

    def __init__(self, model: Provider, faults: Faults) -> None:
        self._model, self._faults = model, faults

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._faults.check("model")
        self._faults.begin("the model")
        response = await self._model.transport.handle_async_request(request)
        try:
            self._faults.check("model")
        except httpx.TransportError:
            self._model.requests.pop()  # nobody has received the answer
            raise
        return response


def _options(name: str) -> dict[str, Any]:
    words = SCENARIOS[name].options
    return {option[2:].replace("-", "_"): int(value) for option, value in zip(words[::2], words[1::2], strict=True)}


@contextlib.asynccontextmanager
async def _serving(name: str, folder: Path, model: Provider, faults: Faults) -> AsyncIterator[FlockAPI]:
    """Start a server, if need be until its store can be used."""
    options = {"max_concurrency": CAPACITY, **_options(name)}
    engine = shop.flock.engine(store=folder / "flock.db", transport=_Network(model, faults), **options)
    app = create_app(shop.flock, engine=engine, api_keys=read_keys(KEYS), metrics=False, protocols=["openai"])
    faults.engine = engine
    async with contextlib.AsyncExitStack() as stack:
        while True:
            try:
                await stack.enter_async_context(app.lifespan())
                break
            except (StoreError, MemoryError) as exc:
                is_clear = isinstance(exc, MemoryError) or "cannot be" in str(exc)
                if faults.rest_s < 0 or not is_clear:
                    raise
                await anyio.sleep(1)
        yield app


def trial(name: str, fault: Fault | None = None) -> Names:
    """Execute a scenario, and start its server again. Return the names of its operations, by kind.

    Raises: AssertionError if a promise is broken.
    """

    async def main(loop: Schedule) -> Names:
        faults, model = Faults(fault, loop), Provider(scenarios._reply)
        bridge, log = _Bridge(faults), folder / "log"
        with failing(faults, loop, log, bridge):
            before, files, client = asyncio.all_tasks(), open_files(), Client("http://test")
            client.is_damaged = fault is not None and fault.error == "corrupt"
            client.lacks_memory = client.eve.lacks_memory = faults.lack_memory

            def play() -> None:
                SCENARIOS[name].play(client)
                with faults.off():
                    if fault is not None and fault.kind != "clock":
                        time.sleep(max(0.0, faults.rest_s))
                    check(client, model, log, capacity=0 if _options(name) else CAPACITY)

            async with _serving(name, folder, model, faults) as bridge.app:
                await Schedule.run_in_executor(loop, None, play)
            with faults.off():
                async with _serving(name, folder, model, faults) as bridge.app:
                    await Schedule.run_in_executor(loop, None, check, client, model, log)
                    await anyio.sleep(DELETED_S)
            client.close()
            gc.collect()  # a statement that has failed keeps its connection open
            left: dict[str, Collection[Any]] = {
                "tasks": asyncio.all_tasks() - before,
                "files": open_files() - files,
                "threads": loop.threads,
            }
            if fault is None or fault.kind != "file" or not fault.seconds:  # otherwise they could not be removed
                left["names"] = set(os.listdir(folder)) - {"flock.db", "flock.db-lock", "flock.db-files", "log"}
            if fault is None:  # otherwise the file may be named again, and is kept for a day
                left["contents"] = glob.glob(f"{folder}/flock.db-files/*/*")
            faults.problems += [f"{what} are left: {each}" for what, each in left.items() if each]
        assert not faults.problems, "\n".join(faults.problems)
        return faults.names

    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        folder = Path(path)
        try:
            return execute(main, 0)
        except Exception as exc:
            if fault is None:
                raise
            words = f"{name} {fault.kind} {fault.error} {fault.at} {fault.seconds:g}"
            raise AssertionError(f"{exc!r}\n\nTo repeat it: python -m tests.proof.failing --fault {words}") from exc


def faults_of(names: Names) -> Sequence[Fault]:
    """Return all faults of a scenario. Those of a model are short, since a run ends when all tries have failed.

    A clock may also be wrong until the scenario has ended, or a sleep, which ends by the clock, would end.
    """
    found = [
        Fault(kind, error, at, seconds)
        for kind, errors in ERRORS.items()
        for error in errors
        for at in range(len(names[kind]))
        for seconds in SECONDS.get(kind, (0.0, 3.0))
    ]
    return [each for each in found if not is_overslept(each, names["clock"])]


def sample(names: Names, count: int, seed: int) -> Sequence[Fault]:
    """Return some faults of a scenario: each second one of SQL, and as many of each operation."""
    rng, kinds = random.Random(seed), [kind for kind in ERRORS if kind != "sql" and names[kind]]
    by_name = defaultdict[tuple[str, str], list[Fault]](list)
    for fault in faults_of(names):
        by_name[fault.kind, names[fault.kind][fault.at]].append(fault)
    found = list[Fault]()
    for number in range(count):
        kind = kinds[(number // 2 + seed) % len(kinds)] if number % 2 else "sql"
        found.append(rng.choice(by_name[rng.choice([each for each in by_name if each[0] == kind])]))
    return found


def distinct(names: Names, earlier: Sequence[Names], seed: int = 0) -> Sequence[Fault]:
    """Return each error of each distinct operation once, without what an *earlier* scenario has done in the same state.

    Statements and calls for files are distinct by their text, and the begin and the end of a transaction by the
    statement that follows or precedes. Of equal ones, and of the times for which they fail, the seed takes one. Each
    operation of another kind is distinct. The state is the same if all operations before are.
    """
    rng, groups = random.Random(seed), defaultdict[tuple[str, ...], list[Fault]](list)
    for fault in faults_of(names):
        kind, at, these = fault.kind, fault.at, names[fault.kind]
        if not these[at]:
            groups[kind, fault.error, f"{at}"].append(fault)
        elif all(those[kind][: at + 1] != these[: at + 1] for those in earlier):
            beside = at + BESIDE.get(these[at], 0)
            groups[kind, fault.error, these[at], *these[beside : beside + 1]].append(fault)
    return [rng.choice(group) for group in groups.values()]


def main() -> None:  # pragma: no cover - run by hand
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", nargs="*", help=f"by default all: {', '.join(SCENARIOS)}")
    parser.add_argument("--trials", type=int, metavar="COUNT", help="of each scenario; by default, each fault is tried")
    parser.add_argument("--distinct", action="store_true", help="try each error of each distinct operation once before")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--fault", nargs=5, metavar=("SCENARIO", "KIND", "ERROR", "AT", "SECONDS"))
    chosen = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "sk-test")
    if chosen.fault:
        name, kind, error, at, seconds = chosen.fault
        trial(name, Fault(kind, error, int(at), float(seconds)))
        return
    logging.disable(logging.CRITICAL)
    began_s, tried, failed, earlier = time.monotonic(), Counter[str](), 0, list[Names]()
    for name in chosen.scenario or SCENARIOS:
        names = trial(name)
        faults = faults_of(names) if chosen.trials is None else sample(names, chosen.trials, chosen.seed)
        if chosen.distinct:
            faults = [*distinct(names, earlier, chosen.seed), *faults]
            earlier.append(names)
        print(f"{name}: {len(faults)} faults of {len(faults_of(names))}", flush=True)
        for fault in faults:
            tried[fault.kind] += 1
            try:
                trial(name, fault)
            except AssertionError as exc:
                failed += 1
                print(exc, flush=True)
    print(f"{tried.total()} faults, {dict(tried)}, {time.monotonic() - began_s:.0f} s, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

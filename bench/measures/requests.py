"""Requests a second, from many connections at once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from bench.load import Sample, repeat, send_all
from bench.measures.bench import Bench, Row
from bench.servers import (
    BARE,
    BARE_MODEL,
    COMMIT,
    FASTAPI,
    FLOOR,
    KEY_AND_METRICS,
    LITESTAR,
    MEMORY,
    OURS,
    POWER,
    Server,
    installed,
)

WARM_UP_S = 0.3
ADD = {"agent_name": "add", "inputs": {"a": 1}}
JUDGE = {"agent_name": "judge", "inputs": {"text": "Splendid."}}
REVIEW = {"agent_name": "review", "inputs": {"text": "Splendid."}}
REVIEWED = b'"is_good":true'
ACCEPTING_CLIENTS = 64
FINISHED_RUNS = 1_000

#: Loads a server for some seconds.
Load = Callable[[Server, float], Any]
Samples = dict[str, list[Sample]]


async def interleaved(bench: Bench, names: Sequence[str], load: Load) -> Samples:
    """Load one server after the other, in rounds."""
    samples: Samples = {name: [] for name in names}
    for name in names:
        await load(bench.server(name), min(WARM_UP_S, bench.effort.seconds))
    for name in bench.turns(names, bench.effort.rounds):
        samples[name].append(await load(bench.server(name), bench.effort.seconds))
    return samples


def figures(samples: Samples, field: str) -> dict[str, list[float]]:
    return {name: [getattr(sample, field) for sample in taken] for name, taken in samples.items()}


def rows_of(what: str, samples: Samples, *more_bases: str) -> list[Row]:
    bases = (BARE, *(base for base in more_bases if base in samples))
    return [
        Row(title=f"{what}, 1/s", figures=figures(samples, "per_s"), bases=bases),
        Row(title=f"{what}: server CPU, µs", figures=figures(samples, "server_us")),
    ]


def checkshape_of(bench: Bench, names: Sequence[str], fetch: Callable[[Server], Any]) -> None:
    """Raise RuntimeError if the JSON of one server has another shape than that of the first one."""
    first, *others = names
    wanted = shape_of(fetch(bench.server(first)))
    for name in others:
        if (found := shape_of(fetch(bench.server(name)))) != wanted:
            raise RuntimeError(f"{name} responds {found}, and {first} responds {wanted}. They do not do the same work.")


def shape_of(value: Any) -> Any:
    """Return JSON with the types of its values instead of the values."""
    if isinstance(value, dict):
        return {name: shape_of(member) for name, member in value.items()}
    if isinstance(value, list):
        return [shape_of(member) for member in value]
    return None if value is None else type(value).__name__


async def agents(bench: Bench) -> list[Row]:
    names = installed([FLOOR, BARE, FASTAPI, LITESTAR, *OURS])
    checkshape_of(bench, names, lambda server: server.get("/agents"))

    async def load(server: Server, seconds: float) -> Sample:
        request = server.raw_request("GET", "/agents")
        return await repeat(server, [request], connections=bench.effort.connections, seconds=seconds)

    samples = await interleaved(bench, names, load)
    busy = Row(title="the load generator is busy at that, %", figures=figures(samples, "load_percent"), bases=())
    return [*rows_of("`GET /agents`", samples), busy]


async def finished(bench: Bench) -> list[Row]:
    samples = await samples_of_finished(bench, installed([BARE, FASTAPI, *OURS]))
    return rows_of("`GET /run/{id}`, finished", samples, POWER)


async def samples_of_finished(bench: Bench, names: Sequence[str]) -> Samples:
    ids = {name: await finished_runs(bench, name) for name in names}

    def fetch(server: Server) -> Any:
        run = server.get(f"/run/{ids[server.name][0]}")
        if server.name == KEY_AND_METRICS:
            del run["principal"]  # only a run that was requested with a key has one
        return run

    checkshape_of(bench, names, fetch)

    async def load(server: Server, seconds: float) -> Sample:
        requests = [server.raw_request("GET", f"/run/{run_id}") for run_id in ids[server.name]]
        return await repeat(server, requests, connections=bench.effort.connections, seconds=seconds)

    return await interleaved(bench, names, load)


async def finished_runs(bench: Bench, name: str) -> list[str]:
    """Return the ids of runs that have ended: in a store on disk spread over all of it, and otherwise new ones."""
    if name in (POWER, KEY_AND_METRICS):
        return bench.run_ids(name, FINISHED_RUNS)
    server = bench.server(name)
    request = server.raw_request("POST", "/run/flock", {**ADD, "async_run": True})
    bodies = await send_all(server, [request] * FINISHED_RUNS, connections=8, expected=202)
    ids = [msgspec.json.decode(body)["run_id"] for body in bodies]
    server.get(f"/run/{ids[-1]}?wait=30")
    return ids


def load_of_runs(body: Any, connections: int, proof: bytes = b"", **headers: str) -> Load:
    async def load(server: Server, seconds: float) -> Sample:
        request = server.raw_request("POST", "/run/flock", body, **headers)
        return await repeat(server, [request], connections=connections, seconds=seconds, proof=proof)

    return load


async def synchronous(bench: Bench) -> list[Row]:
    samples = await samples_of_runs(bench, installed([FLOOR, BARE, COMMIT, FASTAPI, LITESTAR, *OURS]))
    return rows_of("a synchronous run", samples, FASTAPI, COMMIT, POWER)


async def samples_of_runs(bench: Bench, names: Sequence[str]) -> Samples:
    checkshape_of(bench, names, lambda server: server.post("/run/flock", ADD))
    return await interleaved(bench, names, load_of_runs(ADD, bench.effort.connections))


async def accepted(bench: Bench) -> list[Row]:
    """Count only what has ended: after the last response, the time until its run has ended counts too."""
    names = installed([BARE, FASTAPI, *OURS])
    body = {**ADD, "async_run": True}
    checkshape_of(bench, names, lambda server: server.post("/run/flock", body))

    def settle(server: Server, response: bytes) -> None:
        run_id = msgspec.json.decode(response)["run_id"]
        while server.get(f"/run/{run_id}?wait=30")["status"] != "completed":
            pass

    async def load(server: Server, seconds: float) -> Sample:
        request = server.raw_request("POST", "/run/flock", body)
        wait = functools.partial(settle, server)
        return await repeat(
            server, [request], connections=ACCEPTING_CLIENTS, seconds=seconds, expected=202, settle=wait
        )

    return rows_of(f"an accepted run, {ACCEPTING_CLIENTS} clients", await interleaved(bench, names, load), POWER)


async def model(bench: Bench) -> list[Row]:
    names = [BARE_MODEL, MEMORY, POWER, KEY_AND_METRICS]
    for name in names:
        if bench.server(name).post("/run/flock", JUDGE)["result"] != {"is_good": True}:
            raise RuntimeError(f"{name} does not understand the model's answer.")
    samples = await interleaved(bench, names, load_of_runs(JUDGE, bench.effort.connections))
    samples[BARE] = samples.pop(BARE_MODEL)
    return rows_of("a model agent's run", samples)


async def samples_of_reviews(bench: Bench, names: Sequence[str]) -> Samples:
    return await interleaved(bench, names, load_of_runs(REVIEW, bench.effort.connections, REVIEWED))


async def samples_of_streamed_reviews(bench: Bench, names: Sequence[str]) -> Samples:
    """The answer of the model is passed on in the pieces in which it comes."""
    load = load_of_runs(REVIEW, bench.effort.connections, REVIEWED, Accept="text/event-stream")
    return await interleaved(bench, names, load)

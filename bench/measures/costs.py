"""What each costs before the first request: the start, the import, memory, packages."""

import time
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from bench.machine import memory_kb
from bench.measures.batches import output_of
from bench.measures.bench import Bench, Row, empty
from bench.servers import BARE, FASTAPI, FLOOR, LITESTAR, OURS, POWER, ROOT, installed

SERVER = ("uvicorn", "httptools", "uvloop")
#: What a user of each installs, and what its programs import.
PACKAGES = {
    BARE: ("starlette", "msgspec", *SERVER),
    FASTAPI: ("fastapi", *SERVER),
    LITESTAR: ("litestar", *SERVER),
    POWER: ("flockapi",),
}
MODULES = {
    BARE: "msgspec, starlette.applications, uvicorn",
    FASTAPI: "fastapi, uvicorn",
    LITESTAR: "litestar, uvicorn",
    POWER: "flockapi",
}


async def start(bench: Bench) -> list[Row]:
    """Start each server with a new store, and ask for its agents as soon as it listens."""
    names = installed([FLOOR, BARE, FASTAPI, LITESTAR, *OURS])
    started, idle = empty(names), empty(names)
    for number, name in enumerate(bench.turns(names, bench.effort.few_rounds)):
        began = time.perf_counter()
        with bench.fresh(name, store=f"start {number}.db") as server:
            server.get("/agents")
            started[name].append(time.perf_counter() - began)
            idle[name].append(memory_kb(server.pid) / 1024)
    return [Row(title="start to first answer, s", figures=started), Row(title="idle memory, MB", figures=idle)]


async def imports(bench: Bench) -> list[Row]:
    names = [name for name, modules in MODULES.items() if find_spec(modules.partition(",")[0]) is not None]
    figures = empty(names)
    for name in bench.turns(names, bench.effort.rounds):
        (seconds,) = output_of(bench, "bench.peers.imports", MODULES[name])
        figures[name].append(1000 * seconds)
    return [Row(title="CPU of the import, ms", figures=figures)]


async def packages(bench: Bench) -> list[Row]:
    counts, sizes = {}, {}
    for name, wanted in PACKAGES.items():
        if found := with_dependencies(wanted):
            counts[name] = [float(len(found))]
            sizes[name] = [sum(map(size_mb, found.values()))]
    return [Row(title="packages, itself included", figures=counts), Row(title="packages, MB", figures=sizes)]


def with_dependencies(names: tuple[str, ...]) -> dict[str, Distribution]:
    """Return the installed distributions of *names*, and of all that they require without extras. None is missing."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            return {}
        waiting += required_by(found[name])
    return found


def required_by(package: Distribution) -> Iterator[str]:
    for requirement in map(Requirement, package.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name.lower().replace("_", "-")


def size_mb(package: Distribution) -> float:
    """Return the size of the files of a distribution. From a clone, those of this project are its sources."""
    files = [Path(str(package.locate_file(file))) for file in package.files or ()]
    if package.name == "flockapi" and not any(file.name == "flockapi.py" for file in files):
        files = [ROOT / "flockapi.py", *(path for path in (ROOT / "flock").rglob("*") if path.is_file())]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6

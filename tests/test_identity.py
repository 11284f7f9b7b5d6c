"""What identifies a call: the names of its parents and its function, and its arguments as their types read them."""

import contextlib
import functools
import hashlib
import math
import sqlite3
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from flock.core import Flock
from flock.engine import base
from flock.runs import Engine, Run, RunContext, RunStatus
from flock.steps.identity import code_of, digest_of
from flock.store.migrations import MIGRATIONS
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, until_run
from tests.support.servers import serving
from tests.support.stores import undo

SHOP = """
charged = []

def charge(amount: float) -> int:
    charged.append(amount)
    return len(charged)
"""


def program(name: str, source: str = SHOP) -> types.ModuleType:
    """Return a program that is imported under *name*."""
    module = types.ModuleType(name)
    exec(compile(source, f"{name}.py", "exec"), vars(module))
    return module


def digest(function: Callable[..., Any], *, version: int = 2, **arguments: Any) -> str:
    hints = {key: value for key, value in function.__annotations__.items()}
    return digest_of("f", function, msgspec.Raw(msgspec.json.encode(arguments)), hints, version=version)


async def answered(engine: Engine, run: Run) -> Run:
    await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


async def waiting(engine: Engine, run: Run) -> Run:
    return await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)


def paying(flock: Flock, modules: list[types.ModuleType], amounts: list[Any]) -> None:
    """Add an agent that charges the last of *amounts* with the program that was imported last, and then asks."""

    @flock.agent
    async def pay(context: RunContext) -> int:
        number = await context.call(modules[-1].charge, amounts[-1])
        assert await context.ask("Go on?", bool)
        return int(number)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("names", "amounts"),
    [
        pytest.param(["shop", "__main__"], [5, 5], id="imported, then started"),
        pytest.param(["shop", "apps.store"], [5, 5], id="moved"),
        pytest.param(["shop", "shop"], [9, 9.0], id="an equal number"),
    ],
)
async def test_a_call_is_the_same_in_a_program_that_was_moved(
    names: list[str], amounts: list[Any], open_engine: OpenEngine
) -> None:
    flock, modules, given = Flock(), [program(names[0])], amounts[:1]
    paying(flock, modules, given)
    async with open_engine(flock) as engine:
        run = await waiting(engine, await engine.submit("pay", {}))
        modules.append(program(names[1]))
        given.append(amounts[1])
        run = await answered(engine, run)
    assert (run.value, run.error) == ({"result": 1}, None)
    assert [module.charged for module in modules] == [[amounts[0]], []]


STARTED = """
import asyncio
from pathlib import Path
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("shop")

def charge(amount: float) -> int:
    with open("charged", "a") as log:
        log.write("x")
    return 7

async def ship() -> None:
    while not Path("go").exists():
        await asyncio.sleep(0.01)

@flock.agent
async def pay(context: RunContext) -> int:
    number = await context.call(charge, 5)
    await context.call(ship)
    return number

async def main() -> None:
    async with flock.engine(store="flock.db") as engine:
        print((await engine.submit("pay", {})).run_id, flush=True)
        await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.slow
def test_a_server_continues_what_a_moved_and_killed_program_has_begun(tmp_path: Path) -> None:
    """``python shop.py``, and then ``flockapi serve apps/store.py``."""
    script, moved = tmp_path / "shop.py", tmp_path / "apps" / "store.py"
    script.write_text(STARTED)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run_id, deadline = process.stdout.readline().strip(), time.monotonic() + PATIENCE_S
        with contextlib.closing(sqlite3.connect(tmp_path / "flock.db")) as db:
            while db.execute("SELECT name FROM calls").fetchall() != [("charge",)]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        process.kill()
    moved.parent.mkdir()
    script.rename(moved)
    Path("go").touch()
    with serving(moved, tmp_path) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        run = client.get(f"/run/{run_id}", params={"wait": 60}).json()
    assert (run["status"], run["result"]) == ("completed", {"result": 7})
    assert Path("charged").read_text() == "x"


class Shape(msgspec.Struct):
    name: str


class Circle(Shape):
    radius: float = 1.0


def pay(amount: float, *extra: float, shape: Shape | None = None, **more: float) -> None: ...


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"amount": 9}, {"amount": 9.0}, id="a number"),
        pytest.param({"extra": [1, 2]}, {"extra": [1.0, 2.0]}, id="more numbers"),
        pytest.param({"more": {"tip": 1}}, {"more": {"tip": 1.0}}, id="numbers by name"),
        pytest.param({"shape": {"name": "a"}}, {"shape": Shape("a")}, id="an object"),
    ],
)
def test_arguments_are_equal_if_their_types_read_them_as_equal(one: Any, other: Any) -> None:
    pay.__annotations__.update(shape=Shape | None)
    assert digest(pay, **one) == digest(pay, **other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param({"amount": 9}, {"amount": 8}, id="numbers"),
        pytest.param({"amount": "9"}, {"amount": "8"}, id="of another type"),
        pytest.param({"shape": Circle("a", 1)}, {"shape": Circle("a", 2)}, id="of a subclass"),
        pytest.param({"other": 1}, {"other": 2}, id="without a parameter"),
    ],
)
def test_different_arguments_stay_different(one: Any, other: Any) -> None:
    assert digest(pay, **one) != digest(pay, **other)


def test_an_annotation_that_cannot_be_read_leaves_the_value_as_it_is() -> None:
    def odd(value: Callable[[int], int] | complex, other: sqlite3.Connection) -> None: ...

    assert digest(odd, value=1, other=2) == digest(odd, value=1, other=2)
    assert digest(odd, value=1, other=2) != digest(odd, value=1, other=2.0)


def test_a_type_whose_code_raises_leaves_the_value_as_it_is() -> None:
    class Angry(msgspec.Struct):
        n: int

        def __post_init__(self) -> None:
            raise RuntimeError("no")

    def take(value: Angry) -> None: ...

    assert digest(take, value={"n": 1}) != digest(take, value={"n": 2})


# Two functions with one name


def test_the_code_of_a_function_is_that_of_what_it_wraps() -> None:
    def made(n: int) -> Callable[[], int]:
        def inner() -> int:
            return n

        return inner

    class Tool:
        def __call__(self) -> None: ...

    assert code_of(made(1)) == code_of(made(2)) == code_of(functools.partial(made(3)))
    assert code_of(functools.wraps(pay)(lambda: None)) == code_of(pay)
    assert code_of(Tool()) == code_of(Tool.__call__) == code_of(Tool().__call__)
    assert code_of(math.floor) == code_of(math.floor)
    assert code_of(math.floor) != code_of(math.ceil)


@pytest.mark.anyio
@pytest.mark.parametrize("name", [None, "same"])
async def test_two_functions_that_look_like_one_call_are_an_error(name: str | None, open_engine: OpenEngine) -> None:
    flock, first = Flock(), program("first")
    second = program("second", SHOP.replace("len(charged)", "-1"))

    @flock.agent
    async def pay(context: RunContext) -> list[int]:
        return [int(await context.call(each.charge, 5, call_name=name)) for each in (first, second)]

    async with open_engine(flock) as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait((await engine.submit("pay", {})).run_id)
    assert run.error_type == "call_error"
    assert run.error is not None
    assert "Two functions are called 'charge'" in run.error
    assert "call_name=" in run.error
    assert (first.charged, second.charged) == ([5], [])


@pytest.mark.anyio
async def test_one_function_that_is_made_again_is_no_error() -> None:
    """Also under two names: in each step, and in each call that makes calls."""
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        def doubled(n: int) -> int:
            return factor * n

        found = []
        for factor in (2, 3):
            found.append(int(await context.call(doubled, factor)))
            found.append(int(await context.call(doubled, 1)))
        return found

    async with flock.engine() as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait((await engine.submit("work", {})).run_id)
    assert (run.value, run.error) == ({"result": [4, 2, 9, 3]}, None)


# Runs of an earlier version


def old_id(module: types.ModuleType, arguments: bytes) -> str:
    """Return the id of a call of ``charge`` as earlier versions have made it."""
    parts = [f"{module.__name__}.charge".encode(), b"[[],null]", arguments]
    return "charge:" + hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@pytest.mark.anyio
async def test_a_run_of_an_earlier_version_keeps_its_ids(
    open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, module = Flock(), program("shop")
    paying(flock, [module], [5])
    async with open_engine(flock) as engine:
        with monkeypatch.context() as earlier:
            earlier.setattr(base, "CALL_IDS", 1)
            run = await waiting(engine, await engine.submit("pay", {}))
        (call,) = (await engine.get_calls(run))[0]
        assert call.call_id == old_id(module, b'{"amount":5}')
        run = await answered(engine, run)
    assert (run.value, run.error) == ({"result": 1}, None)
    assert module.charged == [5]


@pytest.mark.anyio
async def test_a_step_that_an_earlier_version_has_begun_keeps_its_ids_and_keys(tmp_path: Path) -> None:
    """It was running when the process died, and has no stored call: its call in flight has been sent with a key."""
    flock, module, keys, reached = Flock(), program("shop"), list[str](), anyio.Event()

    async def charge(amount: float, context: RunContext) -> int:
        keys.append(context.idempotency_key)
        if len(keys) == 1:
            reached.set()
            await anyio.sleep_forever()
        return 1

    charge.__module__, charge.__qualname__ = "shop", "charge"

    @flock.agent
    async def pay(context: RunContext) -> int:
        return int(await context.call(charge, 5))

    store = tmp_path / "flock.db"
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(base, "CALL_IDS", 1)
        async with flock.engine(store=store) as engine:
            run = await engine.submit("pay", {})
            await reached.wait()
    with sqlite3.connect(store) as db:  # as that version has left it
        version = next(n for n, each in enumerate(MIGRATIONS) if "ADD COLUMN call_ids" in each[0])
        undo(db, version)
    db.close()
    async with flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.value, run.error) == ({"result": 1}, None)
    call_id = old_id(module, b'{"amount":5}')
    assert keys == [f"run:{run.run_id}/0/{call_id}"] * 2


@pytest.mark.anyio
async def test_a_retry_keeps_the_calls_of_a_run_that_failed_in_an_earlier_version(tmp_path: Path) -> None:
    flock, module, shipped = Flock(), program("shop"), list[str]()

    async def ship(context: RunContext) -> str:
        shipped.append(context.idempotency_key)
        if len(shipped) == 1:
            raise ConnectionError("not now")
        return "shipped"

    @flock.agent
    async def pay(context: RunContext) -> str:
        await context.call(module.charge, 5)
        return str(await context.call(ship, call_name="x"))

    store = tmp_path / "flock.db"
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr(base, "CALL_IDS", 1)
        async with flock.engine(store=store) as engine:
            with anyio.fail_after(PATIENCE_S):
                run = await engine.wait((await engine.submit("pay", {})).run_id)
    with sqlite3.connect(store) as db:  # as that version has left it: failed calls had no exception
        undo(db, next(n for n, each in enumerate(MIGRATIONS) if "ADD COLUMN raised" in each[0]))
    db.close()
    async with flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait((await engine.retry_run(run.run_id)).run_id)
    assert (run.value, run.error) == ({"result": "shipped"}, None)
    assert module.charged == [5]
    assert shipped == [f"run:{run.run_id}/0/ship:x"] * 2


def test_a_run_that_an_earlier_version_has_sent_to_a_cluster_keeps_its_ids() -> None:
    sent = {"run_id": "1", "flock": "f", "agent_name": "a", "inputs": {}, "created_at": "2026-11-28T00:00:00Z"}
    assert msgspec.json.decode(msgspec.json.encode(sent), type=Run).call_ids == 1

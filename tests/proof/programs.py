"""The programs: each is small, and uses one thing that asyncio or a step offers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import anyio

from flock.core import Flock, FlockFactory
from flock.runs import RunContext
from tests.proof.invariants import Program, World

__all__ = ["PROGRAMS"]

Declare = Callable[[Flock, World], None]

PROGRAMS: dict[str, Program] = {}


def program(result: Any, **options: Any) -> Callable[[Declare], Declare]:
    """Add a program; see ``Program`` for the arguments."""

    def add(declare: Declare) -> Declare:
        PROGRAMS[declare.__name__] = Program(declare, result, **options)
        return declare

    return add


@program(0.2)
def one_call(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        return await context.call(world.work, 0.2)


@program(ValueError("0.1"))
def gather_in_which_one_raises(flock: Flock, world: World) -> None:
    """The step cancels the sibling, and its slot is free."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> None:
        await asyncio.gather(context.run_agent("limited", {"seconds": 1}), context.call(world.fail, 0.1))


@program(0.1, times={"limited": 2, "fail": 1})
def gather_in_which_one_raises_and_the_program_continues(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        try:
            await asyncio.gather(context.run_agent("limited", {"seconds": 1}), context.call(world.fail, 0.1))
        except ValueError:
            return (await context.run_agent("limited", {"seconds": 0.1}))["result"]
        return 0


@program(1)
def wait_for_the_first(flock: Flock, world: World) -> None:
    """The step cancels the call that the program no longer awaits, and its slot is free."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        slow = asyncio.ensure_future(context.run_agent("limited", {"seconds": 1}))
        fast = asyncio.ensure_future(context.call(world.work, 0.1))
        done, _ = await asyncio.wait([slow, fast], return_when=asyncio.FIRST_COMPLETED)
        return len(done)


@program(ValueError("0.25"))
def gather_in_which_one_raises_beside_a_model(flock: Flock, world: World) -> None:
    """What the model has written until it is cancelled counts for the run."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> None:
        await asyncio.gather(context.run_agent("writer", {"about": "a"}), context.call(world.fail, 0.25))


@program(3)
def tasks_of_the_program(flock: Flock, world: World) -> None:
    """If the run is cancelled, no task of it goes on, nor a thread."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        calls = [
            context.call(world.block, 0.4),
            context.call(world.work, 0.4),
            context.run_agent("blocking", {"seconds": 0.4}),
        ]
        done, _ = await asyncio.wait([asyncio.ensure_future(call) for call in calls])
        return len(done)


@program(TimeoutError("0.3 s (timeout_s)"), timeout_s=0.3)
def called_agent_beyond_the_deadline(flock: Flock, world: World) -> None:
    """The slot of an agent is taken until its thread has returned."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        return await context.run_agent("blocking", {"seconds": 1})


@program(0.25, times={"block": 1})
def tries_of_a_thread(flock: Flock, world: World) -> None:
    """A function in a thread has been executed, even if the program has stopped waiting for it."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        for _ in range(20):  # a thread may start too late for the time-out
            try:
                async with asyncio.timeout(0.1):
                    return await context.call(world.block, 0.25)
            except TimeoutError:
                pass
        return 0


@program(0.2, times={"work": 2})
def second_try_of_a_coroutine(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        try:
            async with asyncio.timeout(0.1):
                return await context.call(world.work, 1)
        except TimeoutError:
            return await context.call(world.work, 0.2)


@program(ValueError("0.1"), may_be_busy=True)
def task_group_in_which_one_raises(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(context.run_agent("limited", {"seconds": 1}))
            tasks.create_task(context.run_agent("writer", {"about": "a"}))
            for function, seconds in ((world.block, 0.4), (world.fail, 0.1)):
                call: Any = context.call(function, seconds)
                tasks.create_task(call)


@program(0.1)
def anyio_group_that_is_cancelled(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        found: list[float] = []

        async def race(seconds: float) -> None:
            found.append(await context.call(world.work, seconds))
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(context.run_agent, "limited", {"seconds": 1})
            for seconds in (0.1, 1):
                tasks.start_soon(race, seconds)
        return found[0]


@program(0.1, times={"work": 2})
def as_completed(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        for each in asyncio.as_completed([context.call(world.work, 1), context.call(world.work, 0.1)]):
            return await each
        return 0


@program(0.5, times={"work": 1})
def shield(flock: Flock, world: World) -> None:
    """A call that is shielded goes on, but not beyond its run."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        working = asyncio.ensure_future(context.call(world.work, 0.5))
        try:
            async with asyncio.timeout(0.1):
                await asyncio.shield(working)
        except TimeoutError:
            pass
        return await working


@program(2, may_be_busy=True)
def agents_that_call_each_other(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def inner(seconds: float, context: RunContext) -> float:
        found = await asyncio.gather(
            context.run_agent("limited", {"seconds": seconds}), context.run_agent("blocking", {"seconds": seconds})
        )
        return float(sum(each["result"] for each in found))

    @flock.agent(max_concurrency=1)
    async def outer(seconds: float, context: RunContext) -> float:
        return float((await context.run_agent("inner", {"seconds": seconds}))["result"])

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        found = await asyncio.gather(*(context.run_agent(name, {"seconds": 0.5}) for name in ("outer", "inner")))
        return float(sum(each["result"] for each in found))


@program(4, answer=1, times={"work": 1, "limited": 1})
def questions(flock: Flock, world: World) -> None:
    @flock.agent
    async def consult(context: RunContext) -> int:
        return await context.ask("And you?", int)

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        answers = await asyncio.gather(
            context.ask("How many?", int),
            context.run_agent("consult", {}),
            context.call(world.work, 1),
            context.run_agent("limited", {"seconds": 1}),
        )
        return answers[0] + answers[1]["result"] + answers[2] + answers[3]["result"]


@program(0.1)
def question_that_loses(flock: Flock, world: World) -> None:
    """A question is not asked if the program does not wait for it."""

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        asking = asyncio.ensure_future(context.ask("How many?", int))
        working = asyncio.ensure_future(context.call(world.work, 0.1))
        await asyncio.wait([asking, working], return_when=asyncio.FIRST_COMPLETED)
        return working.result()


@program("abcdef")
def streams(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        found = await asyncio.gather(*(context.run_agent("writer", {"about": about}) for about in "ab"))
        return str(found[0]["text"])


@program("abcdef", times={"work": 1, "block": 1})
def tools(flock: Flock, world: World) -> None:
    helper = FlockFactory.create_default_agent(
        name="helper", input="about: str", output="text: str", tools=[world.work, world.block]
    )
    flock.add_agent(helper)

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        return str((await context.run_agent("helper", {"about": "a"}))["text"])


@program("abcdef", times={"limited": 1, "consult": 1}, answer=2)
def question_of_a_tool(flock: Flock, world: World) -> None:
    async def consult(seconds: float, context: RunContext) -> str:
        """Asks a person. While it waits, ``tool_timeout_s`` is not running."""
        answer = await context.ask("How long?", int)
        with world.executing("consult", context):
            return f"{answer} s"

    helper = FlockFactory.create_default_agent(
        name="helper", input="about: str", output="text: str", tools=[consult, "limited"], tool_timeout_s=0.5
    )
    flock.add_agent(helper)

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        return str((await context.run_agent("helper", {"about": "a"}))["text"])


@program(0.2, times={"work": 1, "block": 1})
def agents_in_sequence(flock: Flock, world: World) -> None:
    @flock.agent(output="seconds: float", next_agent="then", max_concurrency=1)
    async def main(context: RunContext) -> dict[str, float]:
        return {"seconds": await context.call(world.work, 0.2)}

    @flock.agent(max_concurrency=1)
    async def then(seconds: float, context: RunContext) -> Any:
        return await context.call(world.block, seconds)


@program(3, times={"block": 4}, may_be_busy=True)
def more_threads_than_slots(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        return sum(await asyncio.gather(*(context.call(world.block, seconds) for seconds in (0.5, 1, 0.5, 1))))


@program(0.3, times={"work": 2, "fail": 1})
def calls_in_a_call(flock: Flock, world: World) -> None:
    async def both(context: RunContext) -> None:
        await asyncio.gather(context.call(world.work, 0.4), context.call(world.fail, 0.1))

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        try:
            await context.call(both)
        except ValueError:
            return await context.call(world.work, 0.3)


@program("set by the call")
def context_variables(flock: Flock, world: World) -> None:
    """A call that is awaited directly has the context of the program, as a coroutine has. A task has a copy."""
    text = ContextVar("text", default="")

    async def change(to: str, context: RunContext) -> str:
        seen = text.get()
        await context.call(world.work, 0.1)
        text.set(to)
        return seen

    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        text.set("set by the program")
        assert await context.call(change, "set by the call") == "set by the program"
        assert await asyncio.ensure_future(context.call(change, "set by a task")) == "set by the call"
        return text.get()


@program([None, 0.3], times={"limited": 1, "work": 1})
def anyio_scopes(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> Any:
        found = None
        with anyio.move_on_after(0.1):
            found = await context.run_agent("limited", {"seconds": 1})
        with anyio.CancelScope(shield=True):
            return [found, await context.call(world.work, 0.3)]


@program("ab", times={"work": 2})
def text_that_is_written_piece_by_piece(flock: Flock, world: World) -> None:
    @flock.agent(max_concurrency=1)
    async def main(context: RunContext) -> AsyncIterator[str]:
        for text in "ab":
            await context.call(world.work, 0.1)
            yield text

"""Random workflow programs: a tree of statements, which an agent executes through its context.

No two events of a program are at the same instant, because all sums of its durations differ. So their order is known.
What the context can do next needs a kind here: its line in ``text``, what it does in ``Walk``, its draw in
``generator``, and what comes out of it in ``interpreter``.
"""

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from flock.core import Flock, FlockFactory, Model
from flock.errors import Uncertain
from flock.runs import RunContext
from flock.testing import FakeModel, ModelRequest, Reply

__all__ = [
    "CALLS",
    "FLOCK",
    "LIFE",
    "MODEL",
    "TIMEOUTS",
    "Kind",
    "Life",
    "Oops",
    "Statement",
    "Walk",
    "described",
    "path_to",
    "text",
    "total",
]

Kind = Literal[
    # side effects: async functions, and functions in threads. They return n or raise Oops(n); a flaky one raises the
    # first time in a process, and a mended one in the first attempt of the run
    "work",
    "fail",
    "flaky",
    "mended",
    "block",
    "block_and_fail",
    # a person answers n; another system sends n; time; plain code
    "ask",
    "receive",
    "sleep",
    "plain",
    # calls whose functions make calls
    "tool",
    "agent",
    # a model agent, whose model calls a tool for each part, all at the same time
    "model",
    # parts one after the other, and at the same time: until the first ends, in time, in the order of their ends
    "seq",
    "gather",
    "group",
    "first",
    "wait",
    "completed",
    # one part; a deadline is a ``context.timeout``
    "timeout",
    "deadline",
    "try",
    "loop",
    "case",
]
TIMEOUTS = ("timeout", "wait")
#: What a time-out decides if its time passes while a group that has failed waits for its other tasks.
FAILED_BEFORE = "failed before"
CALLS = ("work", "fail", "flaky", "mended", "block", "block_and_fail")
#: After which a step may be suspended.
WAITS = ("ask", "receive", "sleep")


class Statement(msgspec.Struct, frozen=True, omit_defaults=True):
    """A statement. Its value is a number or a list of values.

    Attributes:
        parts: the statements in it. "try" has its body and its handler; "case" has what it tests and then its cases.
        n: its number in the program.
        seconds: how long it takes, each time another part of it if it is random; how long a message is awaited.
        limit_s: the time-out of what is below, or ``call_timeout_s``.
        times: iterations of a loop, or how often plain code lets other tasks run.
        is_equal: the call has the same arguments as other such calls of the same parent. Its number is 0.
        is_once: the call is executed at most once.
        comes: when a message comes, if it does.
    """

    kind: Kind
    parts: "tuple[Statement, ...]" = ()
    n: int = 0
    seconds: float = 0.0
    is_random: bool = False
    limit_s: float | None = None
    retries: int = 0
    times: int = 0
    is_equal: bool = False
    is_once: bool = False
    comes: Literal["before", "during", "never"] = "before"

    @property
    def all(self) -> "Iterator[Statement]":
        """This statement and all statements in it."""
        yield self
        for part in self.parts:
            yield from part.all


def path_to(program: Statement, at: str) -> list[tuple[str, Statement]]:
    """Return the statements on the way to a place, each with its own, and the statement there."""
    path = [("0", program)]
    for index in at.split(".")[1:]:
        above, statement = path[-1]
        path.append((f"{above}.{index}", statement.parts[0 if statement.kind == "loop" else int(index)]))
    return path


def total(value: Any) -> int:
    return sum(map(total, value)) if isinstance(value, list) else int(value)


class Oops(Exception):
    """What a side effect raises."""


def described(exc: BaseException) -> str:
    """Return an exception as an outcome that can be compared."""
    if isinstance(exc, BaseExceptionGroup):
        return f"ExceptionGroup({', '.join(map(described, exc.exceptions))})"
    if isinstance(exc, (TimeoutError, Uncertain)):
        return type(exc).__name__
    return f"Oops({exc})" if isinstance(exc, Oops) else f"{type(exc).__name__}: {exc}"


def text(statement: Statement, indent: str = "") -> str:
    """Return a program as people read it."""
    s, more, below = statement, f"{indent}    ", ""
    options = [f"takes {s.seconds:.3f} s"] if s.seconds else []
    options += ["each time other seconds"] if s.is_random else []
    options += [f"call_timeout_s={s.limit_s:.3f}"] if s.limit_s and s.kind not in ("timeout", "deadline") else []
    options += [f"call_retries={s.retries}"] if s.retries else []
    options += ["call_once"] if s.is_once else []
    comment = f"  # {', '.join(options)}" if options else ""
    match s.kind:
        case "plain":
            return f"{indent}plain code{f', sleep(0) * {s.times}' if s.times else ''}{comment}"
        case "ask":
            return f"{indent}ask {s.n}"
        case "receive":
            return f"{indent}receive {s.n}, which {s.comes if s.comes == 'never' else 'is sent ' + s.comes}{comment}"
        case "sleep":
            return f"{indent}sleep({s.seconds:.3f})"
        case "seq":
            return "\n".join(text(part, indent) for part in s.parts)
        case "timeout":
            head = f"async with asyncio.timeout({s.limit_s:.3f}):"
        case "deadline":
            head = f"async with context.timeout({s.limit_s:.3f}):"
        case "loop":
            head = f"for _ in range({s.times}):"
        case "try":
            below = f"\n{indent}except Exception:\n{text(s.parts[1], more)}"
            return f"{indent}try:\n{text(s.parts[0], more)}{below}"
        case kind if kind in CALLS:
            return f"{indent}call {kind}({'equal' if s.is_equal else s.n}){comment}"
        case kind:
            head = f"{kind}{f' {s.n}' if kind in ('tool', 'agent', 'model') else ''}:{comment}"
    between = f"\n{indent}and:\n" if len(s.parts) > 1 and s.kind != "loop" else "\n"
    return f"{indent}{head}\n{between.join(text(part, more) for part in s.parts)}"


# The agent


class Life(Protocol):
    """What one execution of the agent's step reports while it lives."""

    def random_s(self, seconds: float) -> float: ...

    def saw(self, at: str, outcome: Any, statement: Statement) -> None:
        """The program has the outcome of a statement. *at* is its place in the program, with its iterations."""

    def decided(self, at: str, decision: Any) -> None:
        """The program has gone on from what can end in several ways, such as the parts that have ended in time."""

    def waits(self, at: str, statement: Statement) -> None:
        """A sleep or a deadline begins, or a message is awaited."""

    def waited(self, at: str, seconds: float) -> None:
        """It has lasted *seconds*."""

    def cancelled(self, at: str) -> None:
        """A call was cancelled, by the program or by its engine."""

    def cut_off(self, at: str) -> None:
        """The program has cancelled calls below *at*, and has gone on."""

    def executing(self, at: str, effect: Statement) -> contextlib.AbstractContextManager[bool]:
        """A side effect is executed. Yields whether this is the first time in this life."""

    bodies: dict[str, "tuple[Walk, Statement]"]
    #: of the run, from 1
    attempt: int


class _Now(NamedTuple):
    life: Life
    at: str
    effect: Statement


_NOW: ContextVar[_Now] = ContextVar("now")
#: that of the step that is executed
LIFE: ContextVar[Life] = ContextVar("life")
FLOCK = Flock("programs")


async def work(key: str) -> int:
    return await _work(fails=False)


async def fail(key: str) -> int:
    return await _work(fails=True)


async def flaky(key: str) -> int:
    return await _work(fails=None)


async def mended(key: str) -> int:
    return await _work(fails=_NOW.get().life.attempt == 1)


async def _work(*, fails: bool | None) -> int:
    now = _NOW.get()
    with now.life.executing(now.at, now.effect) as is_first:
        await asyncio.sleep(now.effect.seconds)
    if is_first if fails is None else fails:
        raise Oops(now.effect.n)
    return now.effect.n


def block(key: str) -> int:
    now = _NOW.get()
    with now.life.executing(now.at, now.effect):
        time.sleep(now.effect.seconds)
    return now.effect.n


def block_and_fail(key: str) -> int:
    raise Oops(block(key))


async def tool(key: str, context: RunContext) -> Any:
    return await _body(key, context)


@FLOCK.agent
async def helper(key: str, context: RunContext) -> Any:
    return await _body(key, context)


async def _body(key: str, context: RunContext) -> Any:
    walk, statement = LIFE.get().bodies[key]
    return await walk._replace(context=context).do(statement, f"{key}.0")


async def use(key: str, context: RunContext) -> Any:
    walk, statement = LIFE.get().bodies[key]
    return await walk._replace(context=context).do(statement, key.replace("/", "."))


def _reply(request: ModelRequest) -> Any:
    MODEL.requests.clear()
    results = [message["content"] for message in request["messages"] if message["role"] == "tool"]
    if not results:
        return Reply(calls=[("use", {"key": key}) for key in json.loads(request.text.partition("\n")[0])["keys"]])
    return {"total": sum(total(json.loads(result)) for result in results if not result.startswith("Error: "))}


MODEL = FakeModel(_reply)
FLOCK.add_agent(
    FlockFactory.create_default_agent(
        "model",
        model=Model("fake/model", base_url="http://fake/v1", api_key="fake"),
        input="keys: list[str]",
        output="total: int",
        tools=[use],
        tool_timeout_s=86400,
        timeout_s=86400,
    )
)


class Walk(NamedTuple):
    """Executes statements."""

    life: Life
    context: RunContext

    async def do(self, s: Statement, at: str) -> Any:
        try:
            value = await self._do(s, at)
        except Exception as exc:
            self.life.saw(at, f"raised {described(exc)}", s)
            raise
        self.life.saw(at, value, s)
        return value

    async def _do(self, s: Statement, at: str) -> Any:
        match s.kind:
            case "work" | "fail" | "flaky" | "mended" | "block" | "block_and_fail":
                return await self._effect(s, at)
            case "receive":
                return await self._receive(s, at)
            case "sleep":
                self.life.waits(at, s)
                await self.context.sleep(s.seconds)
                self.life.waited(at, s.seconds)
                return 0
            case "ask":
                return await self.context.ask(f"{s.n} at {at}", int)
            case "plain":
                for _ in range(s.times):
                    await asyncio.sleep(0)
                if s.seconds:
                    await asyncio.sleep(self.life.random_s(s.seconds) if s.is_random else s.seconds)
                return 0
            case "tool" | "agent":
                return await self._call_of_calls(s, at)
            case "model":
                tools = {f"{at}/{i}": (self, part) for i, part in enumerate(s.parts)}
                self.life.bodies |= tools
                return (await self.context.run_agent("model", {"keys": list(tools)}))["total"]
            case "seq":
                return [await self.do(part, f"{at}.{i}") for i, part in enumerate(s.parts)]
            case "loop":
                return [await self.do(s.parts[0], f"{at}.{i}") for i in range(s.times)]
            case "try":
                try:
                    return await self.do(s.parts[0], f"{at}.0")
                except Exception:
                    return await self.do(s.parts[1], f"{at}.1")
            case "case":
                chosen = 1 + total(await self.do(s.parts[0], f"{at}.0")) % (len(s.parts) - 1)
                return await self.do(s.parts[chosen], f"{at}.{chosen}")
            case "timeout":
                return await self._in_time(s, at)
            case "deadline":
                return await self._before_deadline(s, at)
            case "gather" | "group":
                return await self._all(s, at)
            case "first" | "wait":
                return await self._some(s, at)
            case "completed":
                return await self._in_order(s, at)
        raise NotImplementedError(s.kind)

    async def _effect(self, s: Statement, at: str) -> Any:
        _NOW.set(_Now(self.life, at, s))
        function = {f.__name__: f for f in (work, fail, flaky, mended, block, block_and_fail)}[s.kind]
        key = "equal" if s.is_equal else at
        is_decided = s.limit_s is not None or s.is_once or s.kind == "mended"
        options: dict[str, Any] = {"call_timeout_s": s.limit_s, "call_retries": s.retries, "call_once": s.is_once}
        try:
            value = await self.context.call(function, key, **options)
        except asyncio.CancelledError:
            self.life.cancelled(at)
            raise
        except Exception as exc:
            if is_decided:
                self.life.decided(at, described(exc))
            raise
        if is_decided:
            self.life.decided(at, "in time")
        return value

    async def _receive(self, s: Statement, at: str) -> Any:
        self.life.waits(at, s)
        options = {"expires_s": s.seconds, "default": 0} if s.seconds else {}
        value = await self.context.receive(f"to-{at}", int, **options)
        if s.seconds:
            self.life.decided(at, value)
        return value

    async def _before_deadline(self, s: Statement, at: str) -> Any:
        self.life.waits(at, s)
        is_cut = False
        try:
            async with self.context.timeout(s.limit_s or 0.0):
                try:
                    value = await self.do(s.parts[0], f"{at}.0")
                except asyncio.CancelledError:
                    is_cut = True
                    raise
        except Exception:
            if is_cut:
                self.life.waited(at, s.limit_s or 0.0)
                self.life.cut_off(at)
            self.life.decided(at, is_cut)
            raise
        self.life.decided(at, False)
        return value

    async def _call_of_calls(self, s: Statement, at: str) -> Any:
        self.life.bodies[at] = self, s.parts[0]
        if s.kind == "agent":
            return (await self.context.run_agent("helper", {"key": at}))["result"]
        try:
            value = await self.context.call(tool, at, call_timeout_s=s.limit_s)
        except Exception as exc:
            is_over = s.limit_s is not None and f" {s.limit_s:g} s (call_timeout_s)" in str(exc)
            if is_over:
                self.life.cut_off(at)
            self.life.decided(at, is_over)
            raise
        self.life.decided(at, False)
        return value

    async def _in_time(self, s: Statement, at: str) -> Any:
        try:
            async with asyncio.timeout(s.limit_s) as scope:
                value = await self.do(s.parts[0], f"{at}.0")
        except Exception as exc:
            if is_over := scope.expired():
                self.life.cut_off(at)
            self.life.decided(at, FAILED_BEFORE if is_over and not isinstance(exc, TimeoutError) else is_over)
            raise
        self.life.decided(at, False)
        return value

    async def _all(self, s: Statement, at: str) -> list[Any]:
        failed = list[int]()

        async def do(i: int, part: Statement) -> Any:
            try:
                return await self.do(part, f"{at}.{i}")
            except Exception:
                failed.append(i)
                raise

        try:
            if s.kind == "gather":
                values = list(await asyncio.gather(*itertools.starmap(do, enumerate(s.parts))))
            else:
                async with asyncio.TaskGroup() as tasks:
                    found = [tasks.create_task(do(i, part)) for i, part in enumerate(s.parts)]
                values = [task.result() for task in found]
        except Exception:
            self.life.decided(at, failed[:1] if s.kind == "gather" else list(failed))
            if s.kind == "group":
                self.life.cut_off(at)
            raise
        self.life.decided(at, [])
        return values

    def _tasks(self, s: Statement, at: str) -> "list[asyncio.Task[Any]]":
        return [asyncio.ensure_future(self.do(part, f"{at}.{i}")) for i, part in enumerate(s.parts)]

    async def _some(self, s: Statement, at: str) -> list[Any]:
        tasks = self._tasks(s, at)
        when = asyncio.FIRST_COMPLETED if s.kind == "first" else asyncio.ALL_COMPLETED
        try:
            done, _ = await asyncio.wait(tasks, timeout=s.limit_s, return_when=when)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.life.decided(at, [i for i, task in enumerate(tasks) if task in done])
        self.life.cut_off(at)
        return [task.result() for task in tasks if task in done]

    async def _in_order(self, s: Statement, at: str) -> list[Any]:
        values, order = list[Any](), list[int]()

        async def do(i: int, part: Statement) -> Any:
            try:
                value = await self.do(part, f"{at}.{i}")
            except Exception:
                order.append(i)
                raise
            order.append(i)
            return value

        try:
            # Tasks, because as_completed starts coroutines in the order of a set.
            for each in asyncio.as_completed([asyncio.ensure_future(do(i, part)) for i, part in enumerate(s.parts)]):
                values.append(await each)
        except Exception:
            self.life.decided(at, order[: len(values) + 1])
            raise
        self.life.decided(at, order)
        return values

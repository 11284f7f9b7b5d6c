"""The public Python API, used as a script uses it."""

import ast
import functools
import gzip
import inspect
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
import pydantic
import pytest

from flock.agents.agent import Agent, FunctionAgent, ModelAgent
from flock.agents.signature import Signature
from flock.client import AsyncFlockClient, FlockClient
from flock.core import Flock, FlockFactory, agent
from flock.errors import AgentNotFound, Conflict, DefinitionError, InvalidData, RunFailed, SignatureError
from flock.runs import BatchFilter, BatchOptions, Run, RunContext, RunFilter, RunStatus, now
from flock.steps.progress import follow_batch
from flock.testing import Failure, FakeModel
from tests.support import PATIENCE_S, ROOT
from tests.support.flocks import sample_flock
from tests.support.servers import flockapi_command


def test_run_returns_the_result() -> None:
    assert sample_flock().run("add", {"a": 40}) == {"result": 42}


@pytest.mark.parametrize(
    ("agent_name", "inputs", "error", "words"),
    [
        ("refuse", {"text": "This"}, RunFailed, "more than I can do"),
        # Nothing needs to be hidden in the caller's own process.
        ("explode", {"text": "x"}, RunFailed, "raised ValueError: a secret: x"),
        ("nobody", None, AgentNotFound, "nobody"),
        ("add", {"a": "1"}, InvalidData, "/inputs/a"),
        ("add", {"a": ...}, InvalidData, "cannot be converted to JSON"),
        ("add", {"a": "\ud800"}, InvalidData, "cannot be converted to JSON"),
    ],
    ids=["agent_error", "exception", "no_agent", "type", "object", "surrogate"],
)
def test_run_raises_what_went_wrong(agent_name: str, inputs: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sample_flock().run(agent_name, inputs)


def test_run_failed_has_an_error_type() -> None:
    with pytest.raises(RunFailed) as caught:
        sample_flock().run("refuse", {"text": "This"})
    assert caught.value.error_type == "agent_error"


# The value of a run


class Count(msgspec.Struct):
    result: int


class CountModel(pydantic.BaseModel):
    result: int


def run_with(status: RunStatus, result: bytes | None = None, **more: Any) -> Run:
    raw = None if result is None else msgspec.Raw(result)
    return Run(
        run_id="r",
        flock="f",
        agent_name="a",
        inputs=msgspec.Raw(b"{}"),
        created_at=now(),
        **more,
        status=status,
        result=raw,
    )


def test_the_value_of_a_run_is_its_decoded_result() -> None:
    run = run_with(RunStatus.COMPLETED, b'{"result":3}')
    assert run.value == {"result": 3}
    assert run.value_as(dict[str, int]) == {"result": 3}
    assert run.value_as(Count) == Count(3)
    assert run.value_as(CountModel) == CountModel(result=3)
    assert run_with(RunStatus.RUNNING).value is None


def test_a_result_of_another_type_is_an_error_with_a_pointer() -> None:
    run = run_with(RunStatus.COMPLETED, b'{"result":"three"}')
    for type_ in (dict[str, int], Count, CountModel):
        with pytest.raises(InvalidData, match=r"^/result/result: ") as caught:
            run.value_as(type_)
        assert len(caught.value.errors) == 1


def test_a_run_without_a_result_has_no_value_of_a_type() -> None:
    """What is wrong depends on whether it has ended."""
    failed = run_with(RunStatus.FAILED, error="It rains.", error_type="weather")
    with pytest.raises(RunFailed, match=r"It rains\.") as caught:
        failed.value_as(Count)
    assert caught.value.error_type == "weather"
    for status in (RunStatus.RUNNING, RunStatus.WAITING):
        with pytest.raises(Conflict, match=rf"The run r is {status}, and has no result here\. .*engine\.wait"):
            run_with(status).value_as(Count)
    with pytest.raises(Conflict, match="with_results=True"):  # as in a list
        run_with(RunStatus.COMPLETED).value_as(Count)


def test_an_unknown_status_of_a_filter_is_an_error() -> None:
    for make in (RunFilter, BatchFilter):
        assert make(status="failed").status is RunStatus.FAILED
        with pytest.raises(
            DefinitionError, match=r"^'done' is not a status\. Use starting, running, waiting, completed,"
        ):
            make(status="done")  # type: ignore[arg-type]


def with_old_names() -> list[Any]:
    """Return what functions return that get options under their old names."""
    flock, old = Flock(), {"retry": "again"}
    make: Any = FlockFactory.create_default_agent
    made: list[Any] = [make("w", output="a", max_retries=5, **old), agent(**old)(asks), flock.agent(**old)(asks)]  # type: ignore[call-overload]
    empty, out, classes = Signature.of(""), Signature.of("a"), list[Any]([Agent, ModelAgent, FunctionAgent])
    made += [classes[0]("w", empty, out, **old), classes[1]("w", empty, out, max_retries=5, **old)]
    made.append(classes[2](asks, **old))
    flock.engine(answer=lambda question: 3)
    options: Any = {"answer": lambda question: 3}
    ran = [flock.run("asks", **options), flock.run_batch("asks", [{}], **options)]

    async def in_loop() -> Any:
        return await flock.run_async("asks", **options)

    ran.append(anyio.run(in_loop))
    return [*(each.on_retry for each in made), made[0].answer_retries, made[4].answer_retries, *ran]


def test_old_names_of_options_work_with_a_warning_in_the_line_that_has_them() -> None:
    with pytest.warns(DeprecationWarning, match="is called") as warned:
        found = with_old_names()
    assert found == [*["again"] * 6, 5, 5, {"result": 3}, [{"result": 3}], {"result": 3}]
    assert {str(each.message).partition(" now")[0] for each in warned} == {
        "answer= is called on_question=",
        "max_retries= is called answer_retries=",
        "retry= is called on_retry=",
    }
    assert all(each.filename == __file__ for each in warned)


def test_the_page_of_names_has_each_option_that_was_renamed() -> None:
    owners = {"DeclaredFlock": "flock.", "FlockClient": "FlockClient.", "AsyncFlockClient": "FlockClient."}
    used: dict[tuple[str, str], set[str]] = {}
    sources = [file.read_text() for file in (ROOT / "flock").rglob("*.py")]
    for node in [node for text in sources if "@renamed(" in text for node in ast.walk(ast.parse(text))]:
        for function in ast.iter_child_nodes(node):
            for line in [ast.unparse(each) for each in getattr(function, "decorator_list", ())]:
                owner, name = getattr(node, "name", ""), getattr(function, "name", "").removesuffix("_async")
                name = owner if name == "__init__" else owners.get(owner, "") + name
                for names in re.findall(r"(\w+)='(\w+)'", line) if line.startswith("renamed(") else ():
                    used.setdefault(names, set()).add(name)
    table = (ROOT / "docs" / "names.md").read_text().partition("| old | new | of |")[2].partition("\n\n")[0]
    rows = [re.findall("`([^`]+)`", line) for line in table.splitlines()[2:]]
    assert {(old.strip("="), new.strip("=")): set(of) for old, new, *of in rows} == {
        names: functions if names[0] != "retry" else set() for names, functions in used.items()
    }, "retry= is of all that makes agents"


def test_the_page_of_names_has_only_names_that_exist() -> None:
    page = (ROOT / "docs" / "names.md").read_text().partition("| old |")[0].replace("\\|", "or")
    ours = [re.split(r"\|", line)[1] for line in page.splitlines() if line.startswith("| ")]
    named = {name for text in ours for code in re.findall("`([^`]+)`", text) for name in _names_in(code)}
    assert {"validate", "next_agent", "History", "on_model_call"} <= named
    nodes = [node for file in (ROOT / "flock").rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    known = {getattr(node, "name", "") for node in nodes}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert named - known == set()


def _names_in(code: str) -> list[str]:
    """Return the names of ours in a piece of code. The types and values in it, and routes, are examples."""
    if code.startswith(("GET ", "POST ")):
        return []
    called, _, options = code.partition("(")
    options = options if options else called if "=" in called else ""
    return [*re.findall(r"\w+", called.partition("=")[0]), *re.findall(r"(\w+)=", options)]


def test_an_option_with_both_names_is_refused() -> None:
    make: Any = agent
    with pytest.raises(TypeError, match=r"^retry= is the old name of on_retry=\. Pass only on_retry=\.$"):
        make(retry="again", on_retry="keep")


def test_methods_whose_options_were_renamed_are_coroutine_functions() -> None:
    methods = [Flock.run_async, Flock.run_batch_async, AsyncFlockClient.run]
    assert all(map(inspect.iscoroutinefunction, methods))
    assert not any(map(inspect.iscoroutinefunction, [Flock.run, Flock.run_batch, FlockClient.run]))


async def asks(context: RunContext) -> int:
    return await context.ask("How many?", int)


@pytest.mark.anyio
async def test_run_in_an_event_loop_names_run_async() -> None:
    flock = sample_flock()
    with pytest.raises(RuntimeError, match=r"await flock\.run_async"):
        flock.run("add", {"a": 1})
    assert await flock.run_async("add", {"a": 1}) == {"result": 3}


def test_the_names_of_agents_are_unique() -> None:
    flock = sample_flock()
    with pytest.raises(DefinitionError, match="already has an agent 'add'"):
        flock.add_agent(flock.agents["add"])


def test_an_invalid_agent_is_refused() -> None:
    not_an_agent: Any = "print"
    with pytest.raises(DefinitionError, match="is not an agent"):
        Flock().add_agent(not_an_agent)
    with pytest.raises(SignatureError, match="cannot be passed by name"):
        Flock().add_agent(print)


def test_the_agent_decorator_takes_options() -> None:
    flock = Flock("named")

    @flock.agent(name="other", description="Says it.")
    def original() -> str:
        return "x"

    assert list(flock.agents) == ["other"]
    assert repr(flock) == "<Flock 'named': other>"
    assert repr(Flock()) == "<Flock 'flock': no agents>"


def test_the_factory_takes_the_arguments_of_the_example() -> None:
    made = FlockFactory.create_default_agent(
        name="text_analyzer",
        description="Analyses.",
        model="openai/gpt-4o",
        input="text: str",
        output="sentiment: str, keywords: list[str]",
    )
    assert (made.name, made.description, made.model) == ("text_analyzer", "Analyses.", "openai/gpt-4o")
    assert list(made.output.schema["properties"]) == ["sentiment", "keywords"]


def test_importing_loads_no_server_and_no_extra() -> None:
    """Nor the HTTP client, which takes as long as the rest, and which only calls of models need."""
    code = "import sys, json, {}; print(json.dumps(sorted(sys.modules)))"
    unneeded = {"uvicorn", "xllamacpp", "litellm", "temporalio", "prometheus_client", "click", "httpx", "httpx2"}
    for module, others in (("flock.core", {"starlette"}), ("flockapi", set[str]())):
        command = [sys.executable, "-c", code.format(module)]
        loaded = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert not (unneeded | others) & set(loaded)


def test_importing_loads_no_engine_and_no_tables() -> None:
    """A flock loads its engine when it needs one, and a batch or a download loads what reads and writes tables."""
    code = "import sys, json, flockapi, flock.core; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    unneeded = {"flock.engine.embedded", "flock.store.store", "flock.steps.journal", "flock.rows.tables"}
    assert not {*unneeded, "flock.rows.results", "flock.rows.scores", "flock.web.batches", "flock.web.ui"} & set(loaded)


def test_any_callable_with_typed_parameters_can_be_an_agent() -> None:
    class Counter:
        """Counts what it is asked for."""

        def __call__(self, text: str, of: str = "e") -> int:
            return text.count(of)

        async def longest(self, text: str) -> str:
            return max(text.split(), key=len)

    flock = Flock()
    flock.add_agent(Counter().longest)
    flock.add_agent(functools.partial(Counter(), of="n"))
    assert flock.run("longest", {"text": "one eleven"}) == {"result": "eleven"}
    assert flock.run("Counter", {"text": "one eleven"}) == {"result": 2}
    with pytest.raises(SignatureError, match="needs a type"):
        flock.add_agent(lambda text: text)
    with pytest.raises(DefinitionError, match="is a class"):
        flock.add_agent(Counter)


def test_generators_and_callables_without_a_signature_are_refused() -> None:
    class Yields:
        def __call__(self, text: str) -> Any:
            yield text

    with pytest.raises(DefinitionError, match="is a generator"):
        Flock().add_agent(Yields())
    with pytest.raises(SignatureError, match="Wrap it in a typed function"):
        Flock().add_agent(max)


# Batches


def test_run_batch_returns_results_in_order() -> None:
    assert sample_flock().run_batch("add", [{"a": 1}, {"a": 2, "b": 5}]) == [{"result": 3}, {"result": 7}]


async def _each(items: Iterable[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    for item in items:
        yield item


@pytest.mark.parametrize(
    "make", [list, tuple, iter, lambda items: (item for item in items), _each], ids="list tuple iter gen async".split()
)
@pytest.mark.slow
def test_run_batch_takes_any_iterable(make: Callable[[Any], Any]) -> None:
    """1,200 items are more than are written at once."""
    results = sample_flock().run_batch("add", make([{"a": n, "b": n} for n in range(1200)]))
    assert results == [{"result": 2 * n} for n in range(1200)]


def test_run_batch_stops_reading_after_a_hundred_invalid_items() -> None:
    read: list[int] = []

    def items() -> Iterator[dict[str, Any]]:
        for n in range(10_000):
            read.append(n)
            yield {"a": "no number"}

    with pytest.raises(InvalidData) as caught:
        sample_flock().run_batch("add", items())
    assert len(caught.value.errors) == len(read) == 100


CSV = "a,b\r\n1,5\r\n40,\r\n"
NDJSON = '{"a": 1, "b": 5}\n\n{"a": 40}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", CSV.encode()),
        ("ROWS.CSV", b"\xef\xbb\xbf" + CSV.replace("\r", "").encode()),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("rows.ndjson", NDJSON.encode()),
        ("rows.jsonl", NDJSON.encode()),
        ("rows.jsonl.gz", gzip.compress(NDJSON.encode(), mtime=0)),
    ],
)
def test_a_batch_is_read_from_a_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert sample_flock().run_batch("add", tmp_path / name) == [{"result": 6}, {"result": 42}]
    assert sample_flock().run_batch("add", str(tmp_path / name)) == [{"result": 6}, {"result": 42}]


def test_run_batch_takes_a_delimiter(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a;b\n1;5\n")
    assert sample_flock().run_batch("add", tmp_path / "rows.csv", delimiter=";") == [{"result": 6}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", "The header is missing"),
        ("b.csv", b"a\nx\n", "line 2 /a: Expected 'int', got 'str'"),
        ("c.csv", b"a,c\n1,2\n", "There is no input 'c'"),
        ("d.csv", b"a\n\xff\n", "line 2: This is not UTF-8"),
        ("e.csv.gz", b"a\n1\n", "e.csv.gz is not a valid gzip file"),
        ("f.ndjson.gz", gzip.compress(b'{"a": 1}', mtime=0)[:-9], "f.ndjson.gz is not a valid gzip file"),
        ("g.ndjson", b'{"a": 1}\n[1]\n', "line 2: Each line must be one JSON object"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_the_error_for_an_unreadable_file_says_why(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidData, match=re.escape(words)):
        sample_flock().run_batch("add", tmp_path / name)


@pytest.mark.parametrize("unclear", ["rows.txt", "rows", "rows.gz", ".csv"])
def test_a_file_name_without_a_known_extension_is_refused(unclear: str) -> None:
    with pytest.raises(DefinitionError, match=r"The format of .* is unknown.* end in \.json, \.ndjson, \.jsonl, \.csv"):
        sample_flock().run_batch("add", unclear)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sample_flock().run_batch("add", tmp_path / "nowhere.csv")


def test_run_batch_maps_names_and_fills_in_static_inputs(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("first\n1\n2\n")
    for rows in ([{"first": 1}, {"first": 2}], tmp_path / "rows.csv"):
        results = sample_flock().run_batch("add", rows, input_mapping={"first": "a"}, static_inputs={"b": 10})
        assert results == [{"result": 11}, {"result": 12}]


@pytest.mark.parametrize(
    ("value", "words"),
    [("x", "/static_inputs/b: Expected 'int', got 'str'"), (..., "/static_inputs: It cannot be converted to JSON")],
    ids=["type", "object"],
)
def test_an_invalid_static_input_is_refused(value: Any, words: str) -> None:
    with pytest.raises(InvalidData, match=words):
        sample_flock().run_batch("add", [{"a": 1}], static_inputs={"b": value})


def test_a_failed_item_is_an_error_in_its_position() -> None:
    """This holds even if all items fail, because the list is the result."""
    flock = sample_flock()

    @flock.agent
    async def odd(n: int) -> int:
        if n % 2 == 0:
            raise ValueError(f"{n} is even")
        return n

    error = {"error": "The agent 'odd' raised ValueError: 2 is even", "error_type": "agent_exception"}
    assert flock.run_batch("odd", [{"n": 1}, {"n": 2}, {"n": 3}]) == [{"result": 1}, error, {"result": 3}]
    assert flock.run_batch("odd", [{"n": 2}]) == [error]
    assert flock.run_batch("odd", [{"n": 1}, {"n": 2}], return_errors=False, box_results=False) == [1, None]
    with pytest.raises(InvalidData, match="/batch_inputs/1/n"):
        flock.run_batch("odd", [{"n": 1}, {"n": "x"}])
    skipped = flock.run_batch("odd", [{"n": 1}, {"n": "x"}], on_invalid="skip")
    assert skipped[0] == {"result": 1}
    assert skipped[1]["error_type"] == "invalid_input"


def test_an_empty_batch_has_no_results(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert sample_flock().run_batch("add", []) == sample_flock().run_batch("add", tmp_path / "rows.csv") == []
    with pytest.raises(AgentNotFound):
        sample_flock().run_batch("nobody", [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_workers": 0}, "max_workers must be at least 1, not 0"),
        ({"on_invalid": "ignore"}, "on_invalid= must be one of reject, skip, not 'ignore'"),
        ({"timeout_s": 0}, "timeout_s= must be a number of seconds above 0"),
        ({"timeout_s": float("nan")}, "timeout_s= must be a number of seconds above 0"),
    ],
)
def test_an_invalid_option_is_reported(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        sample_flock().run_batch("add", [{"a": 1}], **options)


def test_an_item_that_is_not_a_mapping_is_refused() -> None:
    """A caller may pass one mapping instead of a list by mistake."""
    not_items: Any = {"a": 1}
    with pytest.raises(InvalidData, match="/batch_inputs/0: An item must be a mapping of inputs by name"):
        sample_flock().run_batch("add", not_items)


def test_an_exception_of_the_iterable_is_raised() -> None:
    def items() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        raise LookupError("the table is gone")

    with pytest.raises(LookupError, match="the table is gone"):
        sample_flock().run_batch("add", items())


@pytest.mark.anyio
@pytest.mark.parametrize(("options", "most"), [({"max_workers": 130}, 130), ({"parallel": False}, 1)])
async def test_as_many_items_run_at_once_as_there_are_workers(options: dict[str, Any], most: int) -> None:
    """They may be more than a server runs at once by default."""
    flock, running, all_there, seen = Flock(), 0, anyio.Event(), []

    @flock.agent
    async def gather(n: int) -> int:
        nonlocal running
        running += 1
        seen.append(running)
        if running == most:
            all_there.set()
        await all_there.wait()
        running -= 1
        return n

    results = await flock.run_batch_async("gather", [{"n": n} for n in range(130)], box_results=False, **options)
    assert results == list(range(130))
    assert max(seen) == most


@pytest.mark.anyio
async def test_a_cancelled_batch_stops_and_starts_no_more_items() -> None:
    flock, begun, stopped, running = Flock(), [], [], anyio.Event()

    @flock.agent
    async def hang(n: int) -> None:
        begun.append(n)
        if n == 4:
            running.set()
        try:
            await anyio.sleep_forever()
        finally:
            stopped.append(n)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flock.run_batch_async, "hang", [{"n": n} for n in range(100)])
        await running.wait()
        tasks.cancel_scope.cancel()
    assert begun == sorted(stopped) == [0, 1, 2, 3, 4]


@pytest.mark.anyio
async def test_a_cancelled_batch_asks_functions_in_threads_to_stop() -> None:
    flock, asked, running = Flock(), threading.Event(), anyio.Event()

    @flock.agent
    def work(n: int, context: RunContext) -> None:
        anyio.from_thread.run_sync(running.set)
        for _ in range(10_000):
            if context.cancel_requested:
                asked.set()
                return
            time.sleep(0.001)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(flock.run_batch_async, "work", [{"n": 1}])
        await running.wait()
        tasks.cancel_scope.cancel()
    assert await anyio.to_thread.run_sync(asked.wait, 30)


@pytest.mark.anyio
async def test_run_batch_in_an_event_loop_names_run_batch_async() -> None:
    with pytest.raises(RuntimeError, match=r"await flock\.run_batch_async"):
        sample_flock().run_batch("add", [{"a": 1}])
    assert await sample_flock().run_batch_async("add", [{"a": 1}]) == [{"result": 3}]


def test_progress_is_a_line_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """It shows the name, a bar, the count, the rate, the time left and the failures."""
    flock = Flock()

    @flock.agent
    async def often(n: int) -> int:
        await anyio.sleep(0.05)
        if n == 3:
            raise ValueError
        return n

    flock.run_batch("often", [{"n": n} for n in range(60)], progress=True)
    output = capfd.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.split("\r") if "often  [" in line]
    assert "0/60" in lines[0]
    assert re.search(r"\[#+-+\]  \d+/60  [\d.]+/s  0:00:0\d left  1 failed", "\n".join(lines))
    assert re.search(r"\[#{20}\]  60/60  [\d.]+/s  1 failed", lines[-1])

    flock.run_batch("often", [{"n": 1}])
    flock.run_batch("often", [{"n": 1}], progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.anyio
async def test_the_progress_line_counts_the_items_that_wait_for_an_answer(capfd: pytest.CaptureFixture[str]) -> None:
    flock = Flock()

    @flock.agent
    async def ask(n: int, context: RunContext) -> bool:
        return await context.ask("Go on?", bool)

    async with flock.engine() as engine:
        batch = await engine.submit_batch("ask", [{"n": n} for n in range(3)], BatchOptions())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(functools.partial(follow_batch, engine, batch.batch_id, is_shown=True))
            shown = ""
            with anyio.fail_after(PATIENCE_S):
                while "0/3  3 waiting" not in shown:
                    await anyio.sleep(0.05)
                    shown += capfd.readouterr().err
            await engine.cancel_batch(batch.batch_id)


REFUSED = """
from flock.core import Flock, FlockFactory

flock = Flock(model="openai/gpt-4o")
flock.add_agent(FlockFactory.create_default_agent("measure", "", None, "text: str", "length: int"))

if __name__ == "__main__":
    flock.run("measure", {"text": "a"})
"""


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        (
            [Failure(401, message="No such key.")],
            "rejected the API key in OPENAI_API_KEY (HTTP 401). Set a valid key. ",
        ),
        (
            [Failure(400, message="No such key.")],
            "rejected the request (HTTP 400). Check the inputs and the options of the model. ",
        ),
        ([Failure(500, message="No such key.")] * 3, "failed (HTTP 500). Try again later. "),
        (None, "needs an API key. Set the environment variable OPENAI_API_KEY."),
    ],
)
def test_a_refusal_of_a_provider_is_one_line_without_a_server(replies: Any, words: str, tmp_path: Path) -> None:
    """It has the cause, what to do and the provider's message, and no words of servers, batches or event loops."""
    (script := tmp_path / "script.py").write_text(REFUSED)
    for command in ([sys.executable, str(script)], flockapi_command("run", str(script), "measure", "-i", "text=a")):
        model = FakeModel(replies and [*replies])
        with model.serve() as url:
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-test"}
            if replies is None:
                del env["OPENAI_API_KEY"]
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE_S, check=False)
        lines = [line for line in done.stderr.splitlines() if line.strip(" ~^")]  # newer Pythons underline more
        assert words in lines[-1]
        assert ("No such key." in lines[-1]) is (replies is not None)
        assert not re.search("server|request None|atch|anyio|run 0", done.stderr), done.stderr
        assert len(lines) == 1 or (command[0] == sys.executable and len(lines) <= 8), done.stderr


def test_progress_is_shown_if_stderr_is_a_terminal(tmp_path: Path) -> None:
    """The script runs in its own process on a pseudo-terminal."""
    (tmp_path / "script.py").write_text(
        "from flock.core import Flock\nflock = Flock()\n@flock.agent\ndef twice(n: int) -> int:\n    return 2 * n\n"
        "print(flock.run_batch('twice', [{'n': 1}], box_results=False))\n"
    )
    master, slave = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(script, stdout=subprocess.PIPE, stderr=slave, env=env, check=True, timeout=60)
    shown = os.read(master, 10_000).decode()
    os.close(master)
    os.close(slave)
    assert done.stdout == b"[2]\n"
    assert "twice  [####################]  1/1" in shown

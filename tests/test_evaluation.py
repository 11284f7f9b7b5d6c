"""``flockapi evaluate`` and ``Flock.evaluate``: scores of outputs by the values that a table expects."""

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import pytest
from click.testing import CliRunner, Result

from flock.command.cli import main
from flock.core import Flock, FlockFactory, Model
from flock.errors import DefinitionError, InvalidData
from flock.rows.scores import difference, exact, ignoring_case, score_named, set_f1, within
from flock.runs import Usage
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from tests.support import PATIENCE_S

TARGET = """
from typing import TypedDict
from flock.core import Flock

flock = Flock("target")

class Output(TypedDict):
    label: str
    tags: list[str]
    points: float

@flock.agent(version="1")
def classify(text: str) -> Output:
    with open("log", "a") as log:
        log.write(f"{text}\\n")
    if text == "fails":
        raise ValueError(text)
    return {"label": "Good" if "good" in text else "bad", "tags": text.split(), "points": 1.25}

def half(expected: str, actual: str) -> float:
    return 0.5

def wrong(expected: str, actual: str) -> str:
    return "very good"

def none() -> float:
    return 1.0
"""
TABLE = 'text,label,tags,points\ngood day,good,"[""day"",""good""]",1.2\nbad day,good,"[""night""]",9\nfails,bad,,\n'


@pytest.fixture(autouse=True)
def _target(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Path("target.py").write_text(TARGET)
    Path("rows.csv").write_text(TABLE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("target", None)


def evaluate(*arguments: str, rows: str = "rows.csv") -> Result:
    sys.modules.pop("target", None)
    return CliRunner().invoke(main, ["evaluate", "target.py", "classify", rows, *arguments], catch_exceptions=False)


ALL = ("--expect", "label", "--expect", "tags", "--expect", "points", "--on-extra", "ignore")


def executed() -> list[str]:
    return sorted(Path("log").read_text().splitlines())


def test_the_scores_and_the_worst_rows_are_printed_and_written() -> None:
    done = evaluate(*ALL, "--score", "label=nocase", "--score", "points=number:0.1", "--json", "scores.json")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == "model rows failed score label tags points $ per row seconds difference".split()
    assert lines[1].split()[:7] == ["classify", "3", "1", "0.333", "0.333", "0.500", "0.500"]
    assert lines[2].startswith(
        'classify, row 2: 0.000 for {"text":"bad day"}: expected {"label":"good","tags":["night"]'
    )
    (score,) = json.loads(Path("scores.json").read_text())
    assert (score["rows"], score["failed"], score["left"], score["cost_per_row"]) == (3, 1, 0, None)
    assert score["outputs"] == {"label": pytest.approx(1 / 3), "tags": 0.5, "points": 0.5}
    assert [row["row"] for row in score["worst"]] == [2, 3]
    assert score["worst"][1]["expected"] == {"label": "bad"}, "an empty cell is not expected"
    assert "ValueError" in score["worst"][1]["error"]


def test_at_least_is_for_ci() -> None:
    options = (*ALL, "--score", "label=nocase", "--score", "points=number:0.1", "--at-least")
    assert evaluate(*options, "0.33").exit_code == 0
    assert evaluate(*options, "0.34").exit_code == 1


def test_the_same_command_continues_and_only_new_rows_run() -> None:
    assert evaluate(*ALL, "--limit", "1").stdout.splitlines()[1].split()[1:3] == ["1", "0"]
    assert evaluate(*ALL).exit_code == 0
    Path("rows.csv").write_text(TABLE + "good night,good,,\n")
    assert evaluate(*ALL, "--score", "label=nocase").exit_code == 0
    assert evaluate("--expect", "label", "--on-extra", "ignore").exit_code == 0
    assert executed() == ["bad day", "fails", "good day", "good night"]
    assert evaluate("--expect", "label", "--forget").stderr == "rows.csv.flock.db was removed.\n"
    assert not Path("rows.csv.flock.db").exists()


def test_rows_that_are_cut_off_are_left_and_say_why() -> None:
    done = evaluate(*ALL, "--max-failures", "0", "--max-workers", "1", rows=_reversed())
    assert (done.exit_code, "before 2 of 3 items were done" in done.stderr) == (1, True), done.stderr
    assert executed()[-1] == "fails"


def _reversed() -> str:
    header, *lines = TABLE.splitlines()
    Path("reversed.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    return "reversed.csv"


def test_a_german_table_has_decimal_commas_in_expected_numbers() -> None:
    Path("german.csv").write_text("text;ziel\ngood;1,25\n")
    done = evaluate("--expect", "ziel=points", "--delimiter", ";", "--decimal", ",", rows="german.csv")
    assert done.stdout.splitlines()[1].split()[3] == "1.000"


def test_a_function_of_the_user_is_a_score() -> None:
    done = evaluate(*ALL[:2], "--on-extra", "ignore", "--score", "label=target:half")
    assert done.stdout.splitlines()[1].split()[3] == "0.333", "two halves and a failure"
    done = evaluate(*ALL[:2], "--on-extra", "ignore", "--score", "label=target:wrong")
    assert (done.exit_code, "must be a number, not 'very good'" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--expect", "lable"], "Did you mean 'label'?", id="unknown output"),
        pytest.param(["--expect", "missing=label"], "There is no column 'missing' with expected values.", id="column"),
        pytest.param(["--expect", "text=label"], "The column 'text' is an input.", id="input"),
        pytest.param(["--expect", "label", "--score", "tags=set"], "no expected output 'tags'", id="score"),
        pytest.param(["--expect", "label", "--score", "exact"], "'exact' is not OUTPUT=SCORE.", id="no equals sign"),
        pytest.param(["--expect", "label", "--score", "label=best"], "There is no score 'best'. Use exact", id="name"),
        pytest.param(["--expect", "label", "--score", "label=number:x"], "There is no score", id="tolerance"),
        pytest.param(["--expect", "label", "--score", "label=number:-1"], "There is no score", id="negative"),
        pytest.param(["--expect", "label", "--score", "label=number:nan"], "There is no score", id="nan"),
        pytest.param(["--expect", "label", "--score", "label=.x:f"], "There is no score '.x:f' (", id="relative"),
        pytest.param(["--expect", "label", "--score", "label=no_one:f"], "(No module named 'no_one')", id="import"),
        pytest.param(["--expect", "label", "--score", "label=target:flock"], "not a callable", id="no function"),
        pytest.param(["--expect", "label", "--score", "label=target:none"], "too many positional", id="arguments"),
        pytest.param(["--expect", "tags=label", "--map", "tags=text"], "The column 'tags' is an input.", id="mapped"),
        pytest.param(["--expect", "tags=label", "--map", "tags="], "The column 'tags' is dropped.", id="dropped"),
        pytest.param(["--expect", "label", "--expect", "label"], "names a column twice", id="column twice"),
        pytest.param(["--expect", "label", "--expect", "tags=label"], "Several columns have", id="output twice"),
        pytest.param(["--expect", "label", "--at-least", "nan"], "--at-least must be a number", id="bound"),
        pytest.param(["--expect", "label"], "There is no input 'tags'", id="other columns"),
        pytest.param([], "Missing option '--expect'", id="nothing expected"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(options: list[str], words: str) -> None:
    done = evaluate(*options)
    assert done.exit_code in (1, 2)
    assert words in done.stderr
    assert not Path("log").exists()


def test_two_columns_of_one_name_are_refused() -> None:
    Path("twice.csv").write_text("text,label,label\ngood,good,bad\n")
    done = evaluate("--expect", "label", rows="twice.csv")
    assert (done.exit_code, "More than one column is named 'label'." in done.stderr) == (1, True), done.stderr


def test_the_results_of_an_agent_without_a_version_are_not_those_of_the_edited_one() -> None:
    Path("target.py").write_text(TARGET.replace('(version="1")', ""))
    options = ("--expect", "label", "--on-extra", "ignore", "--score", "label=nocase")
    assert evaluate(*options).stdout.splitlines()[1].split()[3] == "0.333"
    assert evaluate(*options).exit_code == 0
    assert len(executed()) == 3, "it continues"
    Path("target.py").write_text(TARGET.replace('(version="1")', "").replace('"bad"', '"good"'))
    done = evaluate(*options)
    assert done.stdout.splitlines()[1].split()[3] == "0.667"
    assert "version" not in done.stderr
    assert len(executed()) == 6


def test_a_table_without_an_expected_value_is_an_error() -> None:
    Path("none.csv").write_text("text,label\ngood,\n")
    done = evaluate("--expect", "label", "--at-least", "0", rows="none.csv")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "No row has an expected value in the columns label.")
    assert evaluate("--expect", "label", rows="none.csv").exit_code == 1


def test_a_score_below_zero_is_not_low_without_a_bound() -> None:
    Path("target.py").write_text(TARGET.replace("return 0.5", "return -0.5"))
    options = ("--expect", "label", "--on-extra", "ignore", "--score", "label=target:half")
    bounds: list[list[str]] = [[], ["--at-least", "-0.3"], ["--at-least", "-0.4"]]
    assert [evaluate(*options, *bound).exit_code for bound in bounds] == [0, 1, 0]


def test_the_type_of_an_expected_cell_is_that_of_an_agent_that_may_run() -> None:
    class Label(TypedDict):
        label: str

    class Number(TypedDict):
        label: int

    flock = Flock()

    @flock.agent(next_agent="second")
    def first(text: str) -> int:
        return len(text)

    @flock.agent
    def second(result: int) -> Label:
        return {"label": "1" if result > 3 else "0"}

    @flock.agent
    def other(text: str) -> Number:
        return {"label": 1}

    Path("sizes.csv").write_text("text,label\ngood,1\n")
    assert flock.evaluate("first", "sizes.csv", ["label"])[0].score == 1


# Models


def answers(request: ModelRequest) -> Reply | Failure:
    number = int(re.findall(r"number (\d+)", request.text)[-1])
    is_right = request["model"] == "large" or number % 2 == 0
    return Reply({"answer": str(number) if is_right else "none"})


def asking(url: str, **options: Any) -> Flock:
    flock = Flock("asking", model=Model("fake/small", base_url=url, api_key="none"))
    flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output="answer", **options))
    return flock


def test_models_are_compared_on_the_same_rows_and_not_paid_again(tmp_path: Path) -> None:
    """The rows that were executed before have their cost and latency too."""
    provider = FakeModel(answers)
    rows = [{"text": f"number {n}", "answer": str(n)} for n in range(20)]
    with provider.serve() as url:
        flock = asking(url)
        models = [Model(f"fake/{name}", base_url=url, api_key="none") for name in ("small", "large")]
        own = flock.model
        for paid in (40, 40):
            small, large = flock.evaluate("ask", rows, ["answer"], models=models, store=tmp_path / "flock.db")
            assert len(provider.requests) == paid
            assert (small.model, small.score, small.difference) == ("fake/small", 0.5, None)
            assert (large.model, large.score, large.worst, large.failed) == ("fake/large", 1.0, [], 0)
            assert large.difference is not None
            mean, low, high = large.difference
            assert (mean, round(low, 2), round(high, 2)) == (0.5, 0.26, 0.74)
            assert [row.row for row in small.worst] == list(range(2, 21, 2))
            assert small.latency_s is not None
        assert flock.model is own
        changed = asking(url, instructions="Be brief.")
        changed.evaluate("ask", rows, ["answer"], models=models[:1], store=tmp_path / "flock.db", limit=5)
    assert len(provider.requests) == 45


def test_the_command_compares_models_on_the_same_rows() -> None:
    """With cost, latency, and the difference of the rows with its interval, which is that of Student's t."""

    def answer(request: ModelRequest) -> Reply:
        number = int(re.findall(r"number (\d+)", request.text)[-1])
        is_right = request["model"] == "gpt-4o" or number % 2 == 0
        return Reply({"answer": str(number) if is_right else "none"}, usage=Usage(input_tokens=1000, output_tokens=500))

    Path("rows.csv").write_text("text,answer\n" + "".join(f"number {n},{n}\n" for n in range(20)))
    Path("target.py").write_text(
        "from flock.core import Flock, FlockFactory\nflock = Flock('asking')\n"
        "flock.add_agent(FlockFactory.create_default_agent('classify', input='text', output='answer'))\n"
    )
    models = ("--model", "openai/gpt-4o-mini", "--model", "openai/gpt-4o")
    with FakeModel(answer) as model:
        for _ in range(2):
            done = evaluate("--expect", "answer", *models, "--json", "scores.json")
            assert done.exit_code == 0, done.stderr
    for name in ("gpt-4o-mini", "gpt-4o"):
        asked = [request.text for request in model.requests if request["model"] == name]
        assert len(asked) == len({re.findall(r"number \d+", text)[-1] for text in asked}) == 20
    head, mini, large, *worst = (re.split(r"  +", line) for line in done.stdout.splitlines())
    assert head == ["model", "rows", "failed", "score", "answer", "$ per row", "seconds", "difference"]
    assert mini[:6] == ["openai/gpt-4o-mini", "20", "0", "0.500", "0.500", "0.000450"]
    assert large[:6] == ["openai/gpt-4o", "20", "0", "1.000", "1.000", "0.007500"]
    assert (mini[7], large[7], len(worst)) == ("-", "+0.500 (+0.260 to +0.740)", 10)
    first, second = json.loads(Path("scores.json").read_text())
    assert (first["model"], first["difference"], second["model"]) == ("openai/gpt-4o-mini", None, "openai/gpt-4o")
    assert second["difference"] == pytest.approx([0.5, 0.26, 0.74], abs=0.001)
    assert (first["cost_per_row"], second["cost_per_row"]) == (pytest.approx(0.00045), pytest.approx(0.0075))
    for score, line in ((first, mini), (second, large)):
        assert score["latency_s"] > 0
        assert line[6] == f"{score['latency_s']:.2f}"


def test_a_model_of_the_agent_itself_is_not_replaced() -> None:
    flock = asking("http://127.0.0.1:1", model="openai/gpt-4o")
    with pytest.raises(DefinitionError, match="has a model of its own"):
        flock.evaluate("ask", [{"text": "x", "answer": "y"}], ["answer"], models=["openai/gpt-4o", "openai/o3"])


def test_the_model_of_an_agent_is_named() -> None:
    provider = FakeModel(answers)
    with provider.serve() as url:
        flock = asking(url, model=Model("fake/large", base_url=url, api_key="none"))
        (found,) = flock.evaluate("ask", [{"text": "number 1", "answer": "1"}], ["answer"], models=["openai/o3"])
    assert (found.model, found.score) == ("fake/large", 1.0)


def test_scores_of_python_may_be_async_and_run_an_agent() -> None:
    flock = Flock()

    @flock.agent
    def work(n: int) -> int:
        return n * n

    @flock.agent
    def judge(expected: int, actual: int) -> float:
        return 1 / (1 + abs(expected - actual))

    async def judged(expected: int, actual: int) -> float:
        return (await flock.run_async("judge", {"expected": expected, "actual": actual}))["result"]  # type: ignore[no-any-return]

    async def fails(expected: int, actual: int) -> float:
        raise LookupError("no judge")

    rows: list[dict[str, Any]] = [{"n": 2, "wanted": 4}, {"n": 3, "wanted": 8}, {"n": 4, "wanted": None}]
    (found,) = flock.evaluate("work", rows, {"wanted": "result"}, scores={"result": judged})
    assert (found.score, found.rows, found.worst[0].row) == (0.75, 2, 2)
    with pytest.raises(LookupError, match="no judge"):
        flock.evaluate("work", rows, {"wanted": "result"}, scores={"result": fails})
    with pytest.raises(InvalidData, match="at least one item"):
        flock.evaluate("work", [], {"wanted": "result"})


async def _both(*work: Any) -> list[Any]:
    found: list[Any] = [None] * len(work)

    async def one(number: int) -> None:
        found[number] = await work[number]

    async with anyio.create_task_group() as tasks:
        for number in range(len(work)):
            tasks.start_soon(one, number)
    return found


def test_evaluations_at_the_same_time_have_their_own_models() -> None:
    """A run of the flock beside them has its own too."""
    provider, seen = FakeModel(answers), list[str]()
    rows = [{"text": f"number {n}", "answer": str(n)} for n in range(3)]
    with provider.serve() as url:
        flock = asking(url)

        async def judged(expected: str, actual: str) -> float:
            seen.append(str(flock.model.name))  # type: ignore[union-attr]
            await anyio.lowlevel.checkpoint()
            return float(expected == actual)

        def work(name: str) -> Any:
            model = Model(f"fake/{name}", base_url=url, api_key="none")
            return flock.evaluate_async("ask", rows, ["answer"], scores={"answer": judged}, models=[model])

        async def all_of() -> list[Any]:
            return await _both(work("large"), work("small"))

        (large,), (small,) = anyio.run(all_of)
    assert ((large.model, large.score), (small.model, small.score)) == (("fake/large", 1.0), ("fake/small", 2 / 3))
    assert {request["model"] for request in provider.requests} == {"large", "small"}
    assert len(provider.requests) == 6
    assert set(seen) == {"fake/small"}


async def _ticks_while(work: Any, seen: list[int]) -> None:
    async def tick() -> None:
        while True:
            await anyio.lowlevel.checkpoint()
            seen[0] += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await work
        tasks.cancel_scope.cancel()


def test_other_tasks_run_while_rows_are_written_to_a_file() -> None:
    seen, at_end = [0], list[int]()
    flock = Flock()

    @flock.agent
    def work(n: int) -> int:
        return n

    def rows() -> Iterator[dict[str, Any]]:
        yield from ({"n": n, "result": n} for n in range(30_000))
        at_end.append(seen[0])
        raise LookupError("no more")

    async def written() -> None:
        with pytest.raises(LookupError, match="no more"):
            await flock.evaluate_async("work", rows(), {"result": "result"})

    anyio.run(_ticks_while, written(), seen)
    assert at_end[0] > 1


def test_other_tasks_run_while_a_file_is_read_for_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, file_digest = [0], hashlib.file_digest
    flock = Flock()

    @flock.agent
    def work(n: int) -> int:
        return n

    def digest_of(file: Any, name: str) -> Any:
        before, deadline = seen[0], time.monotonic() + PATIENCE_S
        while seen[0] == before:
            assert time.monotonic() < deadline, "the event loop is blocked"
            time.sleep(0.001)
        return file_digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", digest_of)
    Path("rows.csv").write_text("n,result\n1,1\n")
    anyio.run(_ticks_while, flock.evaluate_async("work", "rows.csv", ["result"]), seen)


def test_decimals_are_compared_as_numbers() -> None:
    flock = Flock()

    @flock.agent
    def price(n: int) -> Decimal:
        return Decimal("1.20") * n

    Path("prices.csv").write_text("n,wanted\n1,1.2\n2,2.5\n")
    rows = [{"n": 1, "wanted": 1.2}, {"n": 2, "wanted": "2.5"}]
    for table in ("prices.csv", rows):
        assert flock.evaluate("price", table, {"wanted": "result"})[0].score == 0.5  # type: ignore[arg-type]
        (found,) = flock.evaluate("price", table, {"wanted": "result"}, scores={"result": score_named("number:0.1")})  # type: ignore[arg-type]
        assert found.score == 1


# Scores


@pytest.mark.parametrize(
    ("expected", "actual", "score"),
    [
        ([], [], 1.0),
        (["a"], [], 0.0),
        (["a", "b"], ["b", "a", "a"], 1.0),
        (["a", "b"], ["b", "c"], 0.5),
        ([{"x": 1, "y": 2}], [{"y": 2, "x": 1}], 1.0),
        ("a", ["a"], 1.0),
        (["a"], None, 0.0),
        ([1, 2], [2.0, 1.0], 1.0),
        ([1], [True], 0.0),
    ],
)
def test_lists_are_compared_as_sets(expected: Any, actual: Any, score: float) -> None:
    assert set_f1(expected, actual) == score


def test_text_and_numbers_are_compared_with_tolerance() -> None:
    assert (ignoring_case(" Yes", "yes"), ignoring_case("yes", None)) == (1.0, 0.0)
    assert (within(0.5, 1, 1.5), within(0.5, 1, 1.6), within(0.5, 1, None), within(0.5, 1, "1")) == (1, 0, 0, 0)
    assert score_named("number:0.5")(1, 1.5) == 1
    assert (within(0.1, 0.3, 0.4), within(0.1, 0.4, 0.3), within(0.1, 0.3, 0.4001), within(0, 2, 2)) == (1, 1, 0, 1)
    assert score_named("exact")("a", "A") == 0
    assert (ignoring_case("None", None), exact(True, 1), exact(1, True), exact(1, 1.0)) == (0, 0, 0, 1)


def test_the_interval_is_near_that_of_student() -> None:
    for count, quantile, most in (
        (2, 12.706, 1e-4),
        (3, 4.303, 1e-4),
        (4, 3.182, 2e-4),
        (5, 2.776, 2e-4),
        (30, 2.045, 0.03),
    ):
        ours = [float(n % 3) for n in range(count)]
        found = difference([*ours, 1.0], [*([0.0] * count), math.nan])
        assert found is not None
        mean = sum(ours) / count
        deviation = math.sqrt(sum((each - mean) ** 2 for each in ours) / (count - 1))
        assert found[0] == pytest.approx(mean)
        assert (found[2] - found[0]) / deviation * math.sqrt(count) == pytest.approx(quantile, rel=most)
    assert difference([1.0], [0.0]) is None

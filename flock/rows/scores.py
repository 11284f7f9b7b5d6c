"""How well the results of a batch match the expected values of its table, and how models differ."""

import contextlib
import importlib
import inspect
import math
import statistics
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from decimal import Decimal, DecimalException
from functools import partial
from typing import Any

import msgspec

from flock.errors import DefinitionError
from flock.runs import INVALID_INPUT, Run, RunStatus, shown_as

#: Compares an expected value with an output, and returns a number, usually from 0 to 1. It may be async.
Score = Callable[[Any, Any], Any]
KNOWN = "exact, nocase, number:TOLERANCE, set, or a function as module:name"
#: Quantile of the normal distribution for an interval with a confidence of 95 %.
Z = 1.959964
#: Those of Student's t for 1 to 4 degrees of freedom.
T = (12.7062, 4.3027, 3.1824, 2.7764)
#: Max rows with the lowest scores that are kept for each model.
MAX_WORST = 10


class ScoredRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row with its score. ``row`` counts from 1, without the header and rows without a value."""

    row: int
    score: float
    inputs: msgspec.Raw
    expected: dict[str, Any]
    result: msgspec.Raw | None
    error: str | None


class ModelScore(msgspec.Struct, kw_only=True):
    """The scores of a model.

    Attributes:
        rows, failed: the rows that have a score, and those of them that failed, whose score is 0.
        left: rows that did not run.
        score: the mean of the rows, each of which is the mean of its outputs; None without rows.
        outputs: the mean of each output.
        cost_per_row: US dollars, the mean of the rows that called a model; None if it is unknown.
        latency_s: the median of the rows that were executed and completed.
        difference: by how much its score is better than that of the first model on the same rows, and the bounds of the
            confidence interval of 95 %; None for the first model, and for fewer than two rows.
        worst: the rows with the lowest scores below 1.
    """

    model: str
    rows: int = 0
    failed: int = 0
    left: int = 0
    score: float | None = None
    outputs: dict[str, float | None] = {}
    cost_per_row: float | None = None
    latency_s: float | None = None
    difference: tuple[float, float, float] | None = None
    worst: list[ScoredRow] = []


def exact(expected: Any, actual: Any) -> float:
    return float(isinstance(expected, bool) == isinstance(actual, bool) and expected == actual)


def ignoring_case(expected: Any, actual: Any) -> float:
    return float(actual is not None and str(expected).strip().casefold() == str(actual).strip().casefold())


def within(tolerance: float, expected: Any, actual: Any) -> float:
    if not all(isinstance(each, int | float | Decimal) for each in (expected, actual)):
        return 0.0
    off = abs(float(expected) - float(actual))
    return float(off <= tolerance or math.isclose(off, tolerance))


def of_decimals(compare: Score, expected: Any, actual: Any) -> Any:
    """Compare values as Decimals, which are text in JSON."""
    return compare(_decimal(expected), _decimal(actual))


def _decimal(value: Any) -> Any:
    with contextlib.suppress(DecimalException):
        return Decimal(str(value))
    return value


def set_f1(expected: Any, actual: Any) -> float:
    """Return the harmonic mean of precision and recall of a list, in any order and without repetitions."""
    lists = [value if isinstance(value, list) else [value] for value in (expected, actual)]
    wanted, found = ({msgspec.json.encode(_whole(each), order="deterministic") for each in values} for values in lists)
    return 2 * len(wanted & found) / (len(wanted) + len(found)) if wanted or found else 1.0


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def score_named(name: str) -> Score:
    """Return one of ``KNOWN``. Raises DefinitionError."""
    kind, _, rest = name.partition(":")
    try:
        if kind == "number":
            if not 0 <= (tolerance := float(rest or 0)) < math.inf:
                raise ValueError(rest)
            return partial(within, tolerance)
        named: Mapping[str, Score] = {"exact": exact, "nocase": ignoring_case, "set": set_f1}
        found: Score = getattr(importlib.import_module(kind), rest) if rest else named[kind]
        with contextlib.suppress(ValueError):  # some functions in C have no signature
            inspect.signature(found).bind(None, None)
        return found
    except Exception as exc:  # the module may raise anything
        reason = f" ({exc})" if rest and kind != "number" else ""
        raise DefinitionError(f"There is no score {name!r}{reason}. Use {KNOWN}.") from exc


async def add_scores(
    found: ModelScore, pages: AsyncIterator[Sequence[Run]], expected: Mapping[str, str], scores: Mapping[str, Score]
) -> Sequence[float]:
    """Add the items of a batch to *found*, and return their scores, NaN for an item without one.

    Args:
        expected: the outputs by the columns that have their expected values.
        scores: by output; the others are compared by the type of the expected value.

    Raises: what a score raises; DefinitionError if it returns something else than a number.
    """
    columns = {name: array("d") for name in ("", *expected.values())}
    costs, latencies = list[float | None](), array("d")
    async for page in pages:
        for item in page:
            wanted, rated = await _rated(item, expected, scores)
            for name, column in columns.items():
                column.extend([math.nan] * ((item.position or 0) - len(column)))
                column.append(rated.get(name, math.nan))
            found.left += item.status is RunStatus.CANCELLED
            found.failed += bool(rated) and item.status is RunStatus.FAILED
            costs += [] if item.usage is None else [item.usage.cost]
            if item.started_at and item.completed_at and item.status is RunStatus.COMPLETED:
                latencies.append(max(0.0, (item.completed_at - item.started_at).total_seconds()))
            if (score := rated.get("", 1)) < 1:
                found.worst += [shown_as(ScoredRow, item, row=len(columns[""]), score=score, expected=wanted)]
        found.worst = sorted(found.worst, key=lambda row: row.score)[:MAX_WORST]
    found.rows = sum(not math.isnan(score) for score in columns[""])
    found.outputs = {name: _mean([score for score in each if score == score]) for name, each in columns.items()}
    found.score = found.outputs.pop("")
    found.cost_per_row = None if None in costs else _mean([cost for cost in costs if cost is not None])
    found.latency_s = statistics.median(latencies) if latencies else None
    return columns[""]


async def _rated(
    item: Run, expected: Mapping[str, str], scores: Mapping[str, Score]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the expected values and the scores of an item by output, and its own as ""; none if it did not run."""
    if item.status is RunStatus.CANCELLED or item.error_type == INVALID_INPUT:
        return {}, {}
    values = {} if item.extra is None else msgspec.json.decode(item.extra, type=dict[str, Any])
    given = {name: values.get(column) for column, name in expected.items()}
    wanted = {name: value for name, value in given.items() if value not in (None, "")}
    result = {} if item.result is None else msgspec.json.decode(item.result, type=dict[str, Any])
    rated: dict[str, Any] = dict.fromkeys(wanted, 0.0)
    for name in wanted if item.result is not None else ():
        compare = scores.get(name) or (set_f1 if isinstance(wanted[name], list) else exact)
        score: Any = compare(wanted[name], result.get(name))
        rated[name] = score = await score if inspect.isawaitable(score) else score
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise DefinitionError(f"The score of {name!r} must be a number, not {score!r}.")
    return wanted, ({"": statistics.fmean(rated.values()), **rated} if rated else {})


def _mean(numbers: Sequence[float]) -> float | None:
    return statistics.fmean(numbers) if numbers else None


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the mean of the paired differences, with the interval of Student's t, whose quantiles are approximated."""
    pairs = [mine - yours for mine, yours in zip(ours, theirs, strict=False) if mine == mine and yours == yours]
    if len(pairs) < 2:
        return None
    mean, freedom = statistics.fmean(pairs), len(pairs) - 1
    t = Z + (Z**3 + Z) / (4 * freedom) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * freedom**2)
    t = T[freedom - 1] if freedom <= len(T) else t
    half = t * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return mean, mean - half, mean + half

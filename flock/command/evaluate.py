"""The command ``flockapi evaluate``, and what ``Flock.evaluate`` does: a batch for each model, with scores."""

import copy
import math
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import anyio
import click
import msgspec
from msgspec.structs import replace

from flock.agents.agent import ModelAgent
from flock.agents.graph import graph_of
from flock.agents.handoff import agent_of, result_names
from flock.command import batch as command
from flock.command.arguments import pairs, pop_fields
from flock.command.batchfile import BatchFile, forget, run_batch_file
from flock.command.target import load_flock
from flock.command.terminal import echo
from flock.declared import BatchInputs, DeclaredFlock
from flock.engine.embedded import EmbeddedEngine
from flock.engine.rowchecks import as_json, iterate
from flock.errors import DefinitionError
from flock.fair import FairShare
from flock.formats import each_row
from flock.jsontype import Field
from flock.models.models import models_of, names_of
from flock.nearest import did_you_mean
from flock.rows.files import MAX_ROW_BYTES
from flock.rows.items import item_pages
from flock.rows.scores import KNOWN, ModelScore, Score, add_scores, difference, exact, of_decimals, score_named
from flock.runs import Batch, BatchOptions, RunStatus

#: The options of ``flockapi batch`` that an evaluation has too.
SHARED = """target agent rows max_workers mapped static on_extra delimiter decimal encoding timeout_s max_cost
    max_failures limit sample seed progress dedupe state retry forget""".split()
#: Max characters of a value in the terminal.
SHOWN_CHARS = 60
SCORES = f"How an output is compared: {KNOWN}. Repeatable.  [default: set for lists, exact for others]"
MODELS = "Model in place of the flock's. Repeat it to compare others with the first on the same rows."


async def _evaluate(
    flock: DeclaredFlock, job: BatchFile, expect: Mapping[str, str], scores: Mapping[str, Score], models: Sequence[Any]
) -> list[tuple[ModelScore, Batch]]:
    """Run a batch for each model, or for the flock's own, and score its results; see ``Flock.evaluate_async``.

    Cancellation: finished rows are kept for the next call.
    """
    job = replace(job, expected=_expected(flock, job, expect, scores))
    names = {job.agent_name, *(each.to for each in graph_of(job.agent_name, flock.agents))}
    for agent in (agent for name, agent in flock.agents.items() if len(models) > 1 and name in names):
        if isinstance(agent, ModelAgent) and agent.model:
            raise DefinitionError(f"The agent {agent.name!r} has a model of its own. Omit it there to compare models.")
    decimals = [field.name for field in job.expected.values() if field.type in (Decimal, Decimal | None)]
    scores = {**scores, **{name: partial(of_decimals, scores.get(name, exact)) for name in decimals}}
    found, first = list[tuple[ModelScore, Batch]](), None
    of_agent = getattr(flock.agents[job.agent_name], "model", None)

    async def read(score: ModelScore, engine: EmbeddedEngine, done: Batch) -> None:
        nonlocal first
        numbers = await add_scores(score, item_pages(engine, done.batch_id), expect, scores)
        score.difference = None if first is None else difference(numbers, first)
        first = first or numbers

    for model in models or [flock.model]:
        score = ModelScore(model=", ".join(names_of(models_of(of_agent or model, "the flock"))) or job.agent_name)
        own = copy.copy(flock)  # a score, or another task, may run agents of this flock
        own.model = model
        done, _ = await run_batch_file(own, job, BytesIO(), lambda text: None, partial(read, score))
        found.append((score, done))
    return found


def _expected(
    flock: DeclaredFlock, job: BatchFile, expect: Mapping[str, str], scores: Mapping[str, Score]
) -> Mapping[str, Field]:
    """Return the outputs by the columns that have their expected values. Raises AgentNotFound, DefinitionError."""
    first, known = agent_of(flock.agents, job.agent_name), result_names(job.agent_name, flock.agents)
    graph = graph_of(job.agent_name, flock.agents)
    names: Collection[str] = {each.from_ for each in graph if each.to is None}
    if not names or any(each.kind == "function" for each in graph):
        names = flock.agents  # a function decides which agent is the last
    fields = [field for name in flock.agents if name in names for field in flock.agents[name].output.fields]
    outputs = {field.name: field for field in fields if field.name in known}
    for name in [*expect.values(), *scores]:
        if name not in outputs or name not in expect.values():
            hint = f"{did_you_mean(name, outputs)} Known outputs: {', '.join(outputs)}."
            raise DefinitionError(f"There is no expected output {name!r}.{hint}")
        if [*expect.values()].count(name) > 1:
            raise DefinitionError(f"Several columns have the expected output {name!r}. Choose one.")
    for column in expect.keys() & {*job.input_mapping, *(field.name for field in first.input.fields)}:
        what = "is dropped" if job.input_mapping.get(column, "") is None else "is an input"
        raise DefinitionError(f"The column {column!r} {what}. Name another one: --expect COLUMN={expect[column]}.")
    return {column: outputs[name] for column, name in expect.items()}


async def evaluate_rows(
    flock: DeclaredFlock, name: str, rows: BatchInputs, expect: Any, scores: Any, models: Any, **options: Any
) -> list[ModelScore]:
    """Evaluate the rows of a file, or others after they were written to one; see ``Flock.evaluate_async``."""
    with tempfile.TemporaryDirectory(prefix="flock-") as folder:
        path = Path(rows) if isinstance(rows, str | Path) else Path(folder, "rows.ndjson")
        if not isinstance(rows, str | Path):
            share = FairShare()
            with path.open("wb") as file:
                async for row in iterate(each_row(rows)):
                    file.write(bytes(as_json(row, "/batch_inputs", MAX_ROW_BYTES)) + b"\n")
                    await share.checkpoint()
        batch, state = BatchOptions(**pop_fields(options, BatchOptions)), options.pop("store", Path(folder, "flock.db"))
        job = BatchFile(agent_name=name, rows=path, state=Path(state), options=batch, **options)
        columns = expect if isinstance(expect, Mapping) else {name: name for name in expect}
        return [score for score, _ in await _evaluate(flock, job, columns, scores, models)]


@click.command(params=[param for param in command.batch.params if param.name in SHARED])
@click.option("--expect", multiple=True, required=True, metavar="COLUMN[=OUTPUT]", help="Column of expected outputs.")
@click.option("--score", "scores", multiple=True, metavar="OUTPUT=SCORE", help=SCORES)
@click.option("--model", "models", multiple=True, envvar="FLOCK_MODEL", metavar="PROVIDER/MODEL", help=MODELS)
@click.option("--json", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write the scores as JSON.")
@click.option("--at-least", type=float, metavar="SCORE", help="Exit with 1 if the score of a model is lower.")
def evaluate(target: str, agent: str, rows: Path, state: Path | None, expect: Sequence[str], **options: Any) -> None:
    """Run AGENT on each row of a file, and compare its outputs with the columns that have the expected values.

    It is a batch like that of flockapi batch: the same command continues, rows that have not changed are not paid
    again, and --forget removes the store.

    The score of a row is the mean of its outputs, and 0 if it failed. The exit code is 1 if a score is below
    --at-least or rows were cut off, and 0 otherwise.
    """
    state, file, at_least = state or Path(f"{rows.name}.flock.db"), options.pop("file"), options.pop("at_least")
    command.check_paths(rows, file or command.STDOUT, state)
    if at_least is not None and math.isnan(at_least):
        raise click.UsageError("--at-least must be a number, not nan.")
    with command.explaining_errors(rows, file or command.STDOUT, state), command.batch_process():
        if options.pop("forget"):
            command.print_stderr(f"{state} was removed." if forget(state) else f"There is no {state}.")
            return
        flock, models = load_flock(target), options.pop("models")
        named = pairs(options.pop("scores"), "--score", "OUTPUT=SCORE")
        scores = {name: score_named(text) for name, text in named.items()}
        columns = {column: name or column for column, _, name in (each.partition("=") for each in expect)}
        if len(columns) < len(expect):
            raise click.UsageError("--expect names a column twice. Omit one of them.")
        job = command.job_of(flock, agent, options, rows=rows, state=state)
        found = anyio.run(_evaluate, flock, job, columns, scores, models)
        _print([score for score, _ in found])
        if file is not None:
            part = Path(f"{os.path.realpath(file)}.part")
            part.write_bytes(msgspec.json.format(msgspec.json.encode([score for score, _ in found])) + b"\n")
            os.replace(part, part.with_suffix(""))
        for _, done in found:
            if done.status is not RunStatus.COMPLETED:
                command.print_stderr(f"{done.error}")
    are_left = any(done.cancelled_items and done.status is not RunStatus.COMPLETED for _, done in found)
    is_unscored = not any(score.rows or score.left for score, _ in found)
    if is_unscored:
        command.print_stderr(f"No row has an expected value in the columns {', '.join(columns)}.")
    is_low = at_least is not None and not all(score.score is not None and score.score >= at_least for score, _ in found)
    command.end_process(1 if are_left or is_low or is_unscored else 0)


def _print(models: Sequence[ModelScore]) -> None:
    table = [["model", "rows", "failed", "score", *models[0].outputs, "$ per row", "seconds", "difference"]]
    for each in models:
        scores = [_shown(number, ".3f") for number in (each.score, *each.outputs.values())]
        ends = [_shown(each.cost_per_row, ".6f"), _shown(each.latency_s, ".2f")]
        last = "{:+.3f} ({:+.3f} to {:+.3f})".format(*each.difference) if each.difference else "-"
        table.append([each.model, f"{each.rows:,}", f"{each.failed:,}", *scores, *ends, last])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for each in models:
        for row in each.worst:
            got = (row.error or "").encode() if row.result is None else row.result
            found = (bytes(text).decode() for text in (row.inputs, msgspec.json.encode(row.expected), got))
            texts = [text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…" for text in found]
            echo("{}, row {}: {:.3f} for {}: expected {}, got {}".format(each.model, row.row, row.score, *texts))


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)

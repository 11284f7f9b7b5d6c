"""The command ``flockapi batch``."""

import contextlib
import csv
import errno
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn

import anyio
import click
from click.core import ParameterSource
from msgspec.structs import replace

from flock.agents.agent import ModelAgent
from flock.agents.graph import graph_of
from flock.agents.handoff import agent_of
from flock.command.arguments import Seconds, model_option, pairs, pop_fields
from flock.command.batchfile import BatchFile, check_batch_file, run_batch_file, write_partial
from flock.command.batchfile import forget as forget_state
from flock.command.server import abandon_busy_threads
from flock.command.target import load_flock
from flock.command.terminal import TerminalBytes, echo
from flock.declared import DeclaredFlock
from flock.engine.batches import mixed_versions
from flock.engine.rowchecks import BatchCheck
from flock.errors import DefinitionError, FieldError, InvalidData, StoreError
from flock.formats import ENDINGS, FORMATS, format_of, suffix_of
from flock.models.models import Model, ModelChoice, models_of
from flock.options import MAX_SECONDS
from flock.rows.dialect import CSVDialect
from flock.rows.files import MAX_ROW_BYTES
from flock.rows.likeinput import detected_dialect
from flock.runs import MAX_COST, Batch, BatchOptions, Engine, RunStatus, cost_in_words
from flock.store.database import MEMORY

#: Max row errors that are printed.
MAX_LISTED_ERRORS = 20
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: That of ``sysexits.h`` for a file that cannot be written, such as on a full disk.
EXIT_IO = os.EX_IOERR
#: The conventional exit code after Ctrl-C.
EXIT_INTERRUPTED = 130
STDOUT = Path("-")


@click.command()
@click.argument("target")
@click.argument("agent")
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Output file of the results, in the order of the rows; - is stdout. Required without --dry-run.",
)
@click.option(
    "--dry-run",
    "is_dry_run",
    is_flag=True,
    help="Read and check all rows, and print the first rows and the errors. Nothing is run or written.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(FORMATS)),
    help="Format of the results.  [default: by the extension of the output, or of ROWS if the output has none]",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--max-workers", type=click.IntRange(1), default=5, metavar="N", help="Max rows running at the same time."
)
@model_option
@click.option(
    "--map",
    "mapped",
    multiple=True,
    metavar="COLUMN=INPUT",
    help="Use the column COLUMN as INPUT. Repeatable. COLUMN= drops the column.",
)
@click.option(
    "--static",
    "static",
    multiple=True,
    metavar="KEY=VALUE",
    help="Input for all rows that do not have it. Repeatable. Same format as -i of flockapi run.",
)
@click.option(
    "--on-invalid",
    type=click.Choice(["reject", "skip"]),
    default="reject",
    help="If a row is invalid: start nothing, or fail only that row.",
)
@click.option(
    "--on-extra",
    type=click.Choice(["reject", "ignore", "keep"]),
    default="reject",
    help="If a column is not an input: start nothing, drop the column, or copy it to the results.",
)
@click.option("--delimiter", default=",", metavar="CHAR", help="Delimiter of the cells in ROWS.")
@click.option("--decimal", default=".", metavar="CHAR", help="Decimal separator (. or ,) of numbers in ROWS.")
@click.option(
    "--encoding",
    default="utf-8",
    metavar="NAME",
    help="Encoding of ROWS if it is CSV, such as utf-16, or cp1252 for Western European Excel files.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(0, MAX_SECONDS, min_open=True),
    metavar="SECONDS",
    help="Max time for one row.  [default: a day]",
)
@click.option(
    "--max-cost",
    type=click.FloatRange(0, MAX_COST, min_open=True),
    metavar="DOLLARS",
    help="Start no more rows after that many US dollars. The first call of a model always runs, whatever it costs. Run "
    "the command again with more to continue.",
)
@click.option(
    "--max-failures",
    type=click.FloatRange(0),
    metavar="N",
    help="Start no more rows after more than N have failed; below 1, a share of all rows.  [default: no limit]",
)
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="Start only the first N rows. The next command continues."
)
@click.option(
    "--sample", type=click.IntRange(1), metavar="N", help="Start only N random rows. The next command continues."
)
@click.option("--seed", type=int, default=0, metavar="N", help="Choose another random sample.")
@click.option(
    "--try",
    "tried",
    type=click.IntRange(1),
    metavar="N",
    help="Start N random rows, show their results and what the whole will cost, and ask whether to continue.",
)
@click.option(
    "--progress",
    type=click.Choice(["auto", "bar", "lines", "none", "json"]),
    default="auto",
    help="How the progress is shown on stderr: as a bar on a terminal, otherwise as a line each 10 s; or as JSON.",
)
@click.option("--dedupe", is_flag=True, help="Run equal rows once. The others get the same result.")
@click.option(
    "--batch-api",
    is_flag=True,
    help="Call the model through its provider's batch endpoint, for half the price and within a day.",
)
@click.option(
    "--batch-fallback/--no-batch-fallback",
    default=True,
    help="With --batch-api: make calls that the endpoint did not make again, as normal calls.",
)
@click.option(
    "--usage", "with_usage", is_flag=True, help="Add input_tokens, output_tokens and cost of each row to the results."
)
@click.option(
    "--like-input",
    is_flag=True,
    help="Write ROWS with the outputs as more columns: same delimiter, decimal separator, encoding and line ends. "
    "The delimiter and UTF-16 are detected if they are not given.",
)
@click.option(
    "--escape-formulas/--no-escape-formulas",
    default=True,
    help="Put a ' before cells that a spreadsheet would execute as formulas.",
)
@click.option(
    "--files",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder with the files that the cells of file inputs name.",
)
@click.option(
    "--store",
    "state",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="SQLite file that stores rows and results.  [default: the name of the output, or of ROWS, plus .flock.db]",
)
@click.option(
    "--retry",
    type=click.Choice(["failed", "cancelled", "all"]),
    default="cancelled",
    help="Which rows of an earlier command run again: those that were cut off or never ran, or also those that failed.",
)
@click.option("--yes", is_flag=True, help="Run the rows of an agent that has changed without asking.")
@click.option(
    "--partial", is_flag=True, help="Write the rows that have ended so far, also beside a running command; run nothing."
)
@click.option("--forget", is_flag=True, help="Remove the store with all results, and run nothing.")
def batch(
    target: str,
    agent: str,
    rows: Path,
    output: Path | None,
    is_dry_run: bool,
    format_: str | None,
    model: str | None,
    state: Path | None,
    yes: bool,
    tried: int | None,
    partial: bool,
    forget: bool,
    batch_api: bool,
    batch_fallback: bool,
    **options: Any,
) -> None:
    """Run AGENT on each row of a file, and write the results to a file.

    The name of ROWS ends in .csv, .tsv, .xlsx, .parquet, .json, .ndjson or .jsonl, optionally followed by .gz. A table
    has a header, and its cells are typed by the agent's signature. The results are a table with the inputs, the
    outputs, status and error, or JSON.

    The results are kept in a store beside the output. Run the same command again to continue with the rows that never
    ran or were cut off: by a stop, a crash, --max-cost, --max-failures or used up quota. Finished rows do not run
    again, and failed ones only with --retry failed. --forget removes the store.

    The exit code is 0 if all rows completed, 1 if some did not, and 74 if a disk is full. The column "error" has the
    reason. With --dry-run, the exit code is 0 if the rows would be accepted, and 1 otherwise.
    """
    if output is None:
        if not is_dry_run and not (forget and state):
            raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
        output = STDOUT
    state = state or Path(f"{rows.name if output == STDOUT else output}.flock.db")
    check_paths(rows, output, state)
    if forget:
        with explaining_errors(rows, output, state):
            print_stderr(f"{state} was removed." if forget_state(state) else f"There is no {state}.")
        return
    flock = load_flock(target, model)
    with explaining_errors(rows, output, state), batch_process():
        files = {"output": None if output == STDOUT else output, "format": _format_of(output, rows, format_)}
        ask = print_stderr if yes else _confirm
        if batch_api:
            _use_batch_api(flock, agent, fallback=batch_fallback)
        job = job_of(flock, agent, options, rows=rows, state=state, confirm=ask, **files)
        if job.like_input and (job.format not in ("csv", "tsv") or format_of(rows) != FORMATS[job.format]):
            raise DefinitionError("--like-input is for ROWS in CSV or TSV, and an output in the same format.")
        if job.like_input:
            source_of = click.get_current_context().get_parameter_source
            not_given = [name for name in ("delimiter", "encoding") if source_of(name) is ParameterSource.DEFAULT]
            job = replace(job, dialect=anyio.run(detected_dialect, rows, job.dialect, not_given))
        if is_dry_run:
            check = anyio.run(check_batch_file, flock, job)
            _print_check(check, rows)
            sys.exit(0 if check.ok else 1)
        stdout = TerminalBytes() if sys.stdout.isatty() else sys.stdout.buffer
        if partial:
            sofar = anyio.run(write_partial, flock, job, stdout) if state.exists() else None
            if sofar is None:
                raise click.ClickException(f"{state} has no rows of this command. Run it without --partial first.")
            print_stderr(f"{sofar.completed_items:,} of {sofar.total_items:,} rows have ended.")
            _print_mixed(sofar)
            return
        if tried is not None and not _goes_on(flock, job, tried, stdout):
            return
        done, was_left = anyio.run(run_batch_file, flock, job, stdout, print_stderr)
        is_old = not was_left and not _exit_code(done)
        print_stderr(f"All {done.total_items:,} rows are complete." if is_old else _summary(done, output))
        _print_skipped(done.skipped_rows)
        _print_mixed(done)
        if done.cancelled_items and done.status is not RunStatus.COMPLETED:
            print_stderr(f"{done.error}{_resume_hint(state)}")
    end_process(_exit_code(done))


def job_of(flock: DeclaredFlock, agent: str, options: dict[str, Any], **files: Any) -> BatchFile:
    """Return the batch of a command with these options. Raises BadParameter, DefinitionError, InvalidData."""
    texts = pairs(options.pop("static"), "--static", "KEY=VALUE")
    mapped = pairs(options.pop("mapped"), "--map", "COLUMN=INPUT")
    progress: Any = options.pop("progress")
    options["delimiter"] = options["delimiter"].replace(r"\t", "\t")
    return BatchFile(
        agent_name=agent,
        options=BatchOptions(**pop_fields(options, BatchOptions)),
        input_mapping={key: name or None for key, name in mapped.items()},
        static_inputs=flock.agents[agent].input.from_text(texts) if agent in flock.agents else {},
        progress=progress if progress != "auto" else "bar" if sys.stderr.isatty() else "lines",
        dialect=CSVDialect(**pop_fields(options, CSVDialect)),
        **files,
        **options,
    )


def _use_batch_api(flock: DeclaredFlock, agent_name: str, *, fallback: bool) -> None:
    """Let an agent, and those that may follow it, call their models through batch endpoints.

    Raises: AgentNotFound; DefinitionError if one of them cannot.
    """

    def in_batch(choice: ModelChoice) -> tuple[Model, ...]:
        first, *others = models_of(choice, "the flock") or [None]
        return () if first is None else (replace(first, batch=True, batch_fallback=fallback), *others)

    agent_of(flock.agents, agent_name)
    names = dict.fromkeys([agent_name, *(each.to for each in graph_of(agent_name, flock.agents))])
    agents = [agent for agent in map(flock.agents.get, filter(None, names)) if isinstance(agent, ModelAgent)]
    if not agents:
        raise DefinitionError(f"{agent_name!r} is a function. --batch-api needs an agent with a model.")
    for agent in agents:
        agent.check_models(in_batch(agent.model or flock.model))
        agent.model = agent.model and in_batch(agent.model)
    flock.model = in_batch(flock.model) or None


@contextlib.contextmanager
def explaining_errors(rows: Path, output: Path, state: Path) -> Iterator[None]:
    """Turn errors into messages that say how to continue, and into exit codes. ``Commands`` prints any FlockError."""
    try:
        yield
    except KeyboardInterrupt:
        print_stderr(f"Stopped.{_resume_hint(state)}")
        end_process(EXIT_INTERRUPTED)
    except InvalidData as exc:
        raise click.ClickException(_rejection(exc, rows)) from exc
    except DefinitionError as exc:
        raise click.UsageError(str(exc)) from exc
    except BlockingIOError as exc:
        raise click.ClickException(
            f"Another command is using {state}. Wait until it ends, or choose another file with --store."
        ) from exc
    except BrokenPipeError:
        print_stderr(f"The reader closed the pipe before the end of the results.{_resume_hint(state)}")
        raise
    except StoreError as exc:
        cause = _disk_error(exc)
        if cause is None:
            raise
        print_stderr(f"Error: {state}: {cause}.{_resume_hint(state)}")
        end_process(EXIT_IO)
    except OSError as exc:
        path = exc.filename or output
        print_stderr(f"Error: {path}: {exc.strerror or exc}.{_resume_hint(state)}")
        end_process(EXIT_IO if _disk_error(exc) else 1)


def _disk_error(exc: BaseException | None) -> BaseException | None:
    """Return the cause of *exc* if a disk is full, or a file may not grow, or SQLite cannot use its file."""
    while exc is not None:
        is_of_sqlite = getattr(exc, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR"))
        if is_of_sqlite or getattr(exc, "errno", None) in DISK_ERRORS:
            break
        exc = exc.__cause__
    return exc


def _goes_on(flock: DeclaredFlock, job: BatchFile, count: int, stdout: IO[bytes]) -> bool:
    """Run a sample, show its results and an estimate for all rows, and ask whether to continue."""
    sample = replace(job, options=replace(job.options, sample=count))
    done, _ = anyio.run(run_batch_file, flock, sample, stdout, print_stderr, _show_items)
    print_stderr(_estimate(done, count))
    if done.status is not RunStatus.COMPLETED:
        print_stderr(f"{done.error}")
        end_process(1)
    if sys.stdin.isatty():
        return click.confirm("Run the other rows?", err=True)
    print_stderr(f"To run the other rows:\n{_command_without_try()}")
    return False


def _command_without_try() -> str:
    """Return the command that is running, as a shell takes it: with all that it was given but --try."""
    context = click.get_current_context()
    arguments, options = list[str](), list[str]()
    for param in context.command.params:
        name, value = str(param.name), context.params[str(param.name)]
        if context.get_parameter_source(name) is ParameterSource.DEFAULT or name == "tried":
            continue
        if isinstance(param, click.Argument):
            arguments.append(str(value))
        elif isinstance(param, click.Option) and param.is_flag:
            options.append(param.opts[0] if value else param.secondary_opts[0])
        else:
            options += (word for each in (value if param.multiple else [value]) for word in (param.opts[0], str(each)))
    if any(word.startswith("-") for word in arguments):  # "./" before a name is already lost
        options.append("--")
        arguments, options = options, arguments
    return shlex.join([*context.command_path.split(), *arguments, *options])


async def _show_items(engine: Engine, batch: Batch) -> None:
    """Print the first rows that have ended, up to 1,000."""
    for item in await engine.get_items(batch.batch_id, statuses=["completed", "failed"]):
        outcome = bytes(item.result).decode() if item.result is not None else f"{item.status}: {item.error}"
        echo(f"{bytes(item.inputs).decode()} -> {outcome}", err=True)


def _estimate(done: Batch, count: int) -> str:
    """Return how a sample of *count* rows has ended, and what all rows will take."""
    ended = max(1, done.completed_items - done.cancelled_items - done.invalid_items)
    parts = []
    if done.resumed_at is not None and done.completed_at is not None:
        took_s = max(0.0, (done.completed_at - done.resumed_at).total_seconds())
        seconds = took_s * done.cancelled_items / min(count, ended)
        parts.append(f"about {timedelta(seconds=round(seconds))} for the others")
    if done.usage is not None:
        tokens = (done.usage.input_tokens + done.usage.output_tokens) * done.total_items // ended
        parts.append(f"{tokens:,} tokens in all")
    if done.estimated_cost is not None:
        parts.append(f"${done.estimated_cost:.2f} in all")
    return f"{ended:,} of {done.total_items:,} rows were tried, and {done.failed_items:,} failed. {', '.join(parts)}."


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise click.ClickException(f"{question} Nothing was started. To run them, add --yes.")
    echo(question, err=True)
    click.confirm("Continue?", abort=True, err=True)


def _exit_code(done: Batch) -> int:
    is_cut_off = done.cancelled_items and done.status is not RunStatus.COMPLETED
    return 1 if done.failed_items or is_cut_off else 0


def end_process(code: int) -> NoReturn:
    abandon_busy_threads(code)
    sys.exit(code)


def print_stderr(text: str) -> None:
    echo(text, err=True)


def check_paths(rows: Path, output: Path, state: Path) -> None:
    """Raise UsageError if one of the files would overwrite another, or something that is not a file."""
    paths = [os.path.realpath(path) for path in (rows, output, state)]
    if len(set(paths)) < len(paths):
        raise click.UsageError("ROWS, the output and the state (--store) must be three different files.")
    if state.name == MEMORY:
        raise click.UsageError("A batch needs a file to resume from. Choose one with --store.")
    for path in (output, state):
        if not path.parent.is_dir():
            raise click.UsageError(
                f"There is no folder {path.parent}. Create it, or choose another path for {path.name}."
            )
        if path.exists() and not path.is_file():
            raise click.UsageError(f"{path} is not a regular file, so it cannot be replaced. For a pipe, use -o -")


def _format_of(output: Path, rows: Path, name: str | None) -> str:
    """Return the format of the results. Raises UsageError if the output has an unknown extension; DefinitionError."""
    found = FORMATS[name] if name is not None else format_of(output)
    if found is None and not suffix_of(output):
        found = format_of(rows) or FORMATS["csv"]
    if found is None:
        raise click.UsageError(
            f"The extension of {output.name} is not supported. Use {ENDINGS}, optionally followed by .gz, or choose a "
            "format with --format."
        )
    found.check_installed(is_read=False)
    return found.name


@contextlib.contextmanager
def batch_process() -> Iterator[None]:
    """Allow long cells, and drop log records of single rows, whose errors are in the output, and of a full disk."""
    loggers = [logging.getLogger("flock.runs"), logging.getLogger("flock.store")]
    previous_limit = csv.field_size_limit(MAX_ROW_BYTES)
    for logger in loggers:
        logger.addFilter(_is_shown)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_shown)
        csv.field_size_limit(previous_limit)


def _is_shown(record: logging.LogRecord) -> bool:
    # A changed agent is asked about, and the command itself warns of several versions.
    is_repeated = str(record.msg).startswith(("The store %s was last used", "batch %s is mixed"))
    # A full disk ends the command with a line of its own.
    return not hasattr(record, "run_id") and not is_repeated and _disk_error(sys.exc_info()[1]) is None


def _resume_hint(state: Path) -> str:
    return f" Finished rows are stored in {state}. To resume, run the same command again." if state.exists() else ""


def _summary(done: Batch, output: Path) -> str:
    completed = done.completed_items - done.failed_items - done.cancelled_items
    cost = f" They cost {cost_in_words(done.usage)}." if done.usage is not None and done.usage.cost is not None else ""
    if not done.failed_items and done.cancelled_items and done.status is RunStatus.COMPLETED:
        others = f"{done.cancelled_items:,} others were not chosen"
        return f"{completed:,} rows completed.{cost} {others}: to run them, omit --limit and --sample."
    if completed == done.total_items:
        return f"{completed:,} of {completed:,} rows completed.{cost}"
    results = "the results" if output == STDOUT else output
    counts = f"{completed:,} of {done.total_items:,} rows completed, and {done.failed_items:,} failed."
    if done.cancelled_items:
        counts = f"{counts[:-1]}. {done.cancelled_items:,} are left."
    retry = " To run failed rows again, add --retry failed." if done.failed_items > done.invalid_items else ""
    return f"{counts}{cost} For the reasons, see 'error' in {results}.{retry}"


def _print_skipped(count: int | None) -> None:
    if count:
        print_stderr(f"{count:,} {'row has' if count == 1 else 'rows have'} no value, and did not run.")


def _print_mixed(batch: Batch) -> None:
    if batch.is_mixed:
        print_stderr(f"Warning: {mixed_versions(batch)} To run all rows with one version, use another --store.")


def _print_check(check: BatchCheck, rows: Path) -> None:
    for row, extra, *_ in check.rows:
        kept = f" keeps {bytes(extra).decode()}" if extra else ""
        echo(f"{row.at if row.line is None else f'line {row.line}'}: {bytes(row.inputs).decode()}{kept}")
    if check.total_items > len(check.rows):
        echo("…")
    valid = check.total_items - check.invalid_items
    echo(f"{valid:,} of {check.total_items:,} rows in {rows} are valid.")
    _print_skipped(check.skipped_rows)
    echo("".join(f"{line}\n" for line in _error_lines(check.errors)), nl=False)


def _rejection(exc: InvalidData, rows: Path) -> str:
    if exc.errors[0].pointer == "/max_cost":
        return exc.errors[0].detail
    if exc.errors[0].pointer == "/batch_inputs":
        return f"{rows} has no rows, so nothing was started."
    is_json = getattr(format_of(rows), "name", "") in ("json", "ndjson")
    are_of_rows = all(error.pointer and (is_json or (error.line or 0) > 1) for error in exc.errors)
    hint = ["If only some rows are wrong, --on-invalid skip starts the others."] if are_of_rows else []
    return "\n".join([f"Nothing was started, since {rows} is invalid:", *_error_lines(exc.errors), *hint])


def _error_lines(errors: Sequence[FieldError]) -> list[str]:
    lines = [f"  {error}" for error in errors[:MAX_LISTED_ERRORS]]
    if len(errors) > len(lines):
        lines.append(f"  and {len(errors) - len(lines)} more in the part that was read")
    return lines

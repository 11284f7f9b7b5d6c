"""The command ``flockapi``."""

import contextlib
import csv
import functools
import importlib
import importlib.util
import logging
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import anyio
import click
import msgspec

from flock import __version__
from flock.agents.checks import problems
from flock.command.batchfile import BatchFile, check_batch_file, run_batch_file
from flock.command.server import (
    ServerSettings,
    WorkerSettings,
    abandon_busy_threads,
    run_worker,
    serve_flock,
    serve_workers,
)
from flock.declared import DeclaredFlock
from flock.engine.rowchecks import BatchCheck
from flock.engine.store import MEMORY
from flock.errors import DefinitionError, FieldError, FlockError, InvalidData
from flock.limits import Limits, enforced_by
from flock.options import MAX_SECONDS, Option, Options, option_of
from flock.rows.dialect import CSVDialect
from flock.rows.tables import MAX_ROW_BYTES, TableFormat, ending_of, table_format
from flock.runs import Batch, BatchOptions, OnExtra, OnInvalid
from flock.web.auth import KEYS_VARIABLE, new_key, read_keys
from flock.web.options import AppOptions, is_host_name

__all__ = ["Seconds", "load_flock", "main", "options_of"]


# The flock that a command is about


def load_flock(target: str) -> DeclaredFlock:
    """The flock that *target* names: ``path/to/file.py[:name]`` or ``module[:name]``, and ``flock`` where no name is.

    Raises:
        click.ClickException: there is no such file, module or flock, and it says what there is; or the code there
            fails, and it says where.
    """
    place, _, name = target.partition(":")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    except click.ClickException:
        raise
    except Exception as exc:
        raise click.ClickException(_place_and_reason(exc) or f"{place}: {_reason(exc)}") from exc
    flocks = {key: value for key, value in vars(module).items() if isinstance(value, DeclaredFlock)}
    if name in flocks:
        return flocks[name]
    if not name and ("flock" in flocks or len(flocks) == 1):
        return flocks.get("flock") or next(iter(flocks.values()))
    found = f"It has: {', '.join(flocks)}." if flocks else "It has none: write flock = Flock(...) at its top level."
    raise click.ClickException(f"{place} has no flock called {name or 'flock'!r}. {found}")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise click.ClickException(f"There is no file {path}.")
    # As Python does for a script: its neighbours can be imported.
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses and type hints look for it
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise click.ClickException(f"{name!r} is neither a module nor the path of a .py file.")
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not name.startswith(exc.name):
            raise
        raise click.ClickException(f"There is no module {name!r}. For a file, write its path with .py.") from exc


PACKAGE = Path(__file__).parent.parent
#: Where code lies that is not the user's own.
LIBRARIES: Sequence[str | Path] = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    PACKAGE,
    PACKAGE.with_name("flockapi.py"),
)


def _place_and_reason(exc: Exception) -> str | None:
    """``file:line: reason`` for the innermost line of the user's own code; None if none of it had begun."""
    if isinstance(exc, SyntaxError) and exc.filename and os.path.isfile(exc.filename):
        return f"{exc.filename}:{exc.lineno}: {type(exc).__name__}: {exc.msg}"
    for frame in reversed(traceback.extract_tb(exc.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in LIBRARIES):
            return f"{frame.filename}:{frame.lineno}: {_reason(exc)}"
    return None


def _reason(exc: Exception) -> str:
    return str(exc) if isinstance(exc, FlockError) else "".join(traceback.format_exception_only(exc)).strip()


# The commands


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flockapi")
def main() -> None:
    """Put agents behind a REST API.

    TARGET names a flock: path/to/file.py, or module, with :NAME behind it unless the flock is called "flock".
    """


class Seconds(click.FloatRange):
    """A time that is one: FloatRange lets nan pass."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        return seconds


F = TypeVar("F", bound=Callable[..., Any])


def options_of(struct: type[Options], names: Collection[str] | None = None) -> Callable[[F], F]:
    """Add an option to a command for each field of *struct* with a help text, or for those of *names* only."""

    def add(command: F) -> F:
        for field in reversed(msgspec.structs.fields(struct)):
            option = option_of(field)
            if option is not None and option.help and (names is None or field.name in names):
                command = _option(field.name, field.default, option)(command)
        return command

    return add


def _option(name: str, default: Any, option: Option) -> Callable[[F], F]:
    return click.option(
        f"--{name.removesuffix('_s').replace('_', '-')}",
        name,
        type=_type_of(option),
        default=default,
        show_default=True,
        metavar=option.unit,
        help=option.help,
    )


def _type_of(option: Option) -> click.IntRange | Seconds:
    if option.unit == "N":
        return click.IntRange(option.least)
    return Seconds(0, MAX_SECONDS, min_open=not option.is_valid(0))


def _taken(options: dict[str, Any], struct: type[Options]) -> dict[str, Any]:
    """Take the fields of *struct* out of *options*."""
    return {name: options.pop(name) for name in struct.__struct_fields__ if name in options}


def _check_host_names(context: click.Context, param: click.Parameter, hosts: Sequence[str]) -> Sequence[str]:
    for host in hosts:
        if not is_host_name(host):
            raise click.BadParameter(f"{host!r} is not a host name without scheme and port, such as agents.example.")
    return hosts


model_option = click.option(
    "--model",
    envvar="FLOCK_MODEL",
    show_envvar=True,
    metavar="PROVIDER/MODEL",
    help="Model for the agents that name none, in place of the flock's own. local/smollm2-135m needs no key.",
)

expose_errors_option = click.option(
    "--expose-errors", is_flag=True, help="Show the text of any exception to clients; for development."
)

log_json_option = click.option("--log-json", is_flag=True, help="Write the log as JSON, one object a line.")

payload_dir_option = click.option(
    "--payload-dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder for what is too long for the Temporal cluster, the same one for the API and all workers.",
)


@main.command()
@click.argument("target")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8344,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option("--server-name", default="Flock Server", show_default=True, help="Title of the pages.")
@click.option("--ui", "create_ui", is_flag=True, help="Serve the web page at /ui, too.")
@model_option
@click.option(
    "--temporal",
    metavar="HOST:PORT",
    help="Keep runs and batches on this Temporal cluster, where processes of 'flockapi worker' carry them out.",
)
@payload_dir_option
@click.option(
    "--store",
    default="flock.db",
    show_default=True,
    metavar="FILE",
    help="SQLite file that keeps the runs; :memory: keeps them as long as the server runs.",
)
@click.option(
    "--durability",
    type=click.Choice(["power", "process"]),
    default="power",
    show_default=True,
    help="What an accepted run survives: a power cut, or any crash of the process, which is faster.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that share the port and the store.",
)
@options_of(Limits)
@click.option(
    "--csv-dir",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="Folder below which a client may name a CSV file as a batch.  [default: no file is read on a client's word]",
)
@click.option(
    "--on-disconnect",
    type=click.Choice(["cancel", "continue"]),
    default="cancel",
    show_default=True,
    help="What becomes of a synchronous run whose caller goes away.",
)
@expose_errors_option
@click.option(
    "--api-keys-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keys that requests need, NAME=KEY a line; NAME:admin sees all. Beside those in FLOCK_API_KEYS.",
)
@click.option("--allow-anonymous", is_flag=True, help="Ask nobody for a key, wherever it listens.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    callback=_check_host_names,
    metavar="HOST",
    help="Answer by this name too, if a proxy forwards it; may be given many times. Others are answered with 421.",
)
@click.option(
    "--root-path",
    default="",
    metavar="PATH",
    help="Path that a proxy cuts off before it forwards a request; links begin with it.",
)
@click.option(
    "--forwarded-allow-ips",
    metavar="ADDRESSES",
    help="Proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted, separated by commas; * is all.  "
    "[default: FORWARDED_ALLOW_IPS of the environment, or 127.0.0.1]",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin call the server from a browser; may be given many times.",
)
@options_of(ServerSettings)
@options_of(AppOptions)
@log_json_option
@click.option(
    "--metrics/--no-metrics",
    default=None,
    help="Serve /metrics for Prometheus.  [default: if prometheus-client is installed]",
)
@click.pass_context
def serve(
    context: click.Context, /, target: str, model: str | None, workers: int, api_keys_file: Path | None, **options: Any
) -> None:
    """Serve the flock that TARGET names over HTTP.

    If others can connect, directly or by a proxy, every request needs a key. If none is named, one is made and printed
    at the start. --allowed-host, --root-path and --forwarded-allow-ips say that a proxy forwards requests.
    """
    load = functools.partial(_load_with_model, target, model)
    if options["temporal"]:
        _check_options_for_temporal(context)
    elif options["payload_dir"]:
        raise click.UsageError("--payload-dir goes with --temporal only: an SQLite file keeps what is long itself.")
    try:
        own, limits = _taken(options, ServerSettings), Limits(**_taken(options, Limits))
        app = AppOptions(api_keys=_keys(api_keys_file), **options)
        settings = ServerSettings(app=app, limits=limits, **own)
        if workers == 1:
            serve_flock(load(), settings)
        elif settings.store == MEMORY and not settings.temporal:
            raise click.UsageError(
                "Several workers share their runs by a file: name one with --store, or leave out --workers."
            )
        else:
            serve_workers(load, workers, settings)
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc


#: Why an option of ``serve`` has no effect on a cluster, by who takes the server's place.
IN_PLACE_OF_THE_SERVER = {
    "cluster": "the cluster keeps the runs",
    "namespace": "how long runs are kept is the namespace's own setting",
    "worker": "give it to flockapi worker",
}
NOT_WITH_TEMPORAL = {name: why for who, why in IN_PLACE_OF_THE_SERVER.items() for name in enforced_by(who)} | {
    "store": IN_PLACE_OF_THE_SERVER["cluster"],
    "durability": IN_PLACE_OF_THE_SERVER["cluster"],
    "expose_errors": IN_PLACE_OF_THE_SERVER["worker"],
}


def _check_options_for_temporal(context: click.Context) -> None:
    """Refuse what nobody would heed."""
    for option in context.command.params:
        is_given = context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
        if is_given and option.name in NOT_WITH_TEMPORAL:
            reason = NOT_WITH_TEMPORAL[option.name]
            raise click.UsageError(f"{option.opts[0]} does not go with --temporal: {reason}.")


def _keys(file: Path | None) -> dict[str, str] | None:
    """The keys of the file beside those of the environment; None where there is no file: the server looks itself."""
    if file is None:
        return None
    return read_keys("\n".join([file.read_text("utf-8"), os.environ.get(KEYS_VARIABLE, "")]))


@main.command()
@click.argument("target")
@click.option(
    "--temporal",
    required=True,
    envvar="TEMPORAL_ADDRESS",
    show_envvar=True,
    metavar="HOST:PORT",
    help="The Temporal cluster; its namespace, TLS and API key are read from TEMPORAL_NAMESPACE and the like.",
)
@payload_dir_option
@model_option
@options_of(Limits, enforced_by("worker"))
@options_of(WorkerSettings)
@expose_errors_option
@log_json_option
def worker(target: str, model: str | None, **options: Any) -> None:
    """Carry out runs and batches of the flock that TARGET names, which 'flockapi serve --temporal' has accepted.

    Start as many as there is work for, on as many machines; they need no port of their own.
    """
    try:
        settings = WorkerSettings(limits=Limits(**_taken(options, Limits)), **options)
        run_worker(_load_with_model(target, model), settings)
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc


@main.command()
def key() -> None:
    """Print a new API key: 256 random bits."""
    click.echo(new_key())


@main.command()
@click.argument("target")
@model_option
def check(target: str, model: str | None) -> None:
    """Say what is missing for the agents of the flock that TARGET names to run, without a call over the network.

    A key, a model, a provider, a package or an agent that another one hands on to: each is one line, as 'flockapi
    serve' logs it at its start. The exit code is 0 if nothing is missing, and 1 otherwise.
    """
    flock = _load_with_model(target, model)
    found = problems(flock.agents, flock.model)
    for problem in found:
        click.echo(problem)
    if found:
        sys.exit(1)
    click.echo(f"{', '.join(flock.agents) or 'no agents'}: nothing is missing.")


def _load_with_model(target: str, model: str | None) -> DeclaredFlock:
    flock = load_flock(target)
    flock.model = model or flock.model
    return flock


@main.command()
@click.argument("target")
@click.argument("agent")
@click.option(
    "-i",
    "--input",
    "inputs",
    multiple=True,
    metavar="KEY=VALUE",
    help="One input; may be given many times. Text where the agent takes text, JSON otherwise.",
)
@model_option
def run(target: str, agent: str, inputs: Sequence[str], model: str | None) -> None:
    """Run AGENT of the flock that TARGET names once, and print its result as JSON."""
    flock = _load_with_model(target, model)
    texts = _pairs(inputs, "-i", "KEY=VALUE")
    try:
        signature = flock.agents[agent].input if agent in flock.agents else None
        result = flock.run(agent, signature.from_text(texts) if signature else texts)
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())


def _pairs(given: Sequence[str], option: str, form: str) -> dict[str, str]:
    pairs = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not {form}.", param_hint=option)
        pairs[key] = value
    return pairs


#: How many errors of rows are listed.
MAX_LISTED_ERRORS = 20
#: What a shell makes of a program that Ctrl-C has ended.
EXIT_INTERRUPTED = 130


@main.command()
@click.argument("target")
@click.argument("agent")
@click.argument("rows", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    metavar="FILE",
    help="Where the results go, in the order of the rows; - is stdout. It is required without --dry-run.",
)
@click.option(
    "--dry-run",
    "is_dry_run",
    is_flag=True,
    help="Read and check all rows, and print the first of them and what is wrong. Run and write nothing.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["csv", "ndjson"]),
    help="Of the results.  [default: by the ending of the output, or of ROWS if the output has none]",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--max-workers", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Rows at work at once."
)
@model_option
@click.option(
    "--map",
    "mapped",
    multiple=True,
    metavar="COLUMN=INPUT",
    help="What a column is called as an input; may be given many times. COLUMN= drops the column.",
)
@click.option(
    "--static",
    "static",
    multiple=True,
    metavar="KEY=VALUE",
    help="An input for all rows that do not bring it; may be given many times. As -i of flockapi run.",
)
@click.option(
    "--on-invalid",
    type=click.Choice(["reject", "skip"]),
    default="reject",
    show_default=True,
    help="Where a row does not fit: begin nothing, or let that row fail.",
)
@click.option(
    "--on-extra",
    type=click.Choice(["reject", "ignore", "keep"]),
    default="reject",
    show_default=True,
    help="What becomes of columns that are no input: begin nothing, drop them, or carry them into the results.",
)
@click.option("--delimiter", default=",", show_default=True, metavar="CHAR", help="Between the cells of ROWS.")
@click.option(
    "--decimal", default=".", show_default=True, metavar="CHAR", help="Before the fraction of numbers in ROWS, . or ,"
)
@click.option(
    "--encoding",
    default="utf-8",
    show_default=True,
    metavar="NAME",
    help="Of ROWS, if it is CSV; such as utf-16, or cp1252 for Western European files of Excel.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(0, MAX_SECONDS, min_open=True),
    metavar="SECONDS",
    help="The longest that one row may take.  [default: a day]",
)
@click.option(
    "--escape-formulas/--no-escape-formulas",
    default=True,
    show_default=True,
    help="Put a ' before cells that a spreadsheet would run.",
)
@click.option(
    "--store",
    "state",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="SQLite file that keeps what is done until the end.  [default: the output with .flock.db behind it]",
)
def batch(
    target: str,
    agent: str,
    rows: Path,
    output: Path | None,
    is_dry_run: bool,
    format_: TableFormat | None,
    force: bool,
    max_workers: int,
    model: str | None,
    mapped: Sequence[str],
    static: Sequence[str],
    on_invalid: OnInvalid,
    on_extra: OnExtra,
    delimiter: str,
    decimal: str,
    encoding: str,
    timeout_s: float | None,
    escape_formulas: bool,
    state: Path | None,
) -> None:
    """Run AGENT over each row of a file, and write the results to another.

    ROWS is CSV with a header, typed by the agent's signature, or NDJSON: its name ends in .csv, .ndjson or .jsonl, also
    with .gz behind it. The results are CSV with the inputs, the outputs, status and error, or NDJSON.

    It may be stopped, or killed: the same command goes on where it was, and nothing that was done is done again. The
    exit code is 0 if all rows completed, and 1 if some failed; the column "error" says why. With --dry-run it is 0 if
    the rows would be accepted, and 1 if not.
    """
    if output is None:
        if not is_dry_run:
            raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
        output = STDOUT
    state = state or Path(f"{rows.name if output == STDOUT else output}.flock.db")
    _check_places(rows, output, state)
    flock = _load_with_model(target, model)
    try:
        wanted = BatchFile(
            agent_name=agent,
            rows=rows,
            output=None if output == STDOUT else output,
            format=format_ or _format_of(output, rows),
            force=force,
            state=state,
            options=BatchOptions(max_workers=max_workers, timeout_s=timeout_s),
            on_invalid=on_invalid,
            input_mapping={key: name or None for key, name in _pairs(mapped, "--map", "COLUMN=INPUT").items()},
            static_inputs=_static_inputs(flock, agent, _pairs(static, "--static", "KEY=VALUE")),
            on_extra=on_extra,
            dialect=CSVDialect(delimiter=delimiter.replace(r"\t", "\t"), decimal=decimal, encoding=encoding),
            escape_formulas=escape_formulas,
        )
        if is_dry_run:
            with _process_for_rows():
                check = anyio.run(check_batch_file, flock, wanted)
            _print_check(check, rows)
            sys.exit(0 if check.ok else 1)
        with _process_for_rows():
            done = anyio.run(run_batch_file, flock, wanted, sys.stdout.buffer, _say)
        _say(_summary(done, output))
        exit_code = 0 if done.completed_items and not (done.failed_items or done.cancelled_items) else 1
    except KeyboardInterrupt:
        _say(f"Stopped.{_what_is_kept(state)}")
        exit_code = EXIT_INTERRUPTED
    except InvalidData as exc:
        raise click.ClickException(_listed(exc, rows)) from exc
    except DefinitionError as exc:
        raise click.UsageError(str(exc)) from exc
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc
    except BlockingIOError as exc:
        raise click.ClickException(
            f"Another command is at work on {state}. Let it end, or name another file with --store."
        ) from exc
    except BrokenPipeError:
        _say(f"Nobody read the results to their end.{_what_is_kept(state)}")
        raise
    except OSError as exc:
        place = exc.filename or output
        raise click.ClickException(f"{place}: {exc.strerror or exc}.{_what_is_kept(state)}") from exc
    abandon_busy_threads(exit_code)
    sys.exit(exit_code)


STDOUT = Path("-")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _check_places(rows: Path, output: Path, state: Path) -> None:
    """Raises UsageError where one of them would take the place of another, or of what is no file."""
    places = [os.path.realpath(place) for place in (rows, output, state)]
    if len(set(places)) < len(places):
        raise click.UsageError("ROWS, the output and the state (--store) are three files: name another one.")
    if state.name == MEMORY:
        raise click.UsageError("A batch that can go on is kept in a file: name one with --store.")
    for place in (output, state):
        if not place.parent.is_dir():
            raise click.UsageError(
                f"There is no folder {place.parent}. Make it, or name another place for {place.name}."
            )
        if place.exists() and not place.is_file():
            raise click.UsageError(f"{place} is no file that could be replaced. For a pipe, write -o -")


def _format_of(output: Path, rows: Path) -> TableFormat:
    """Raises UsageError if the output has the ending of another format."""
    if ending_of(output) and table_format(output) is None:
        raise click.UsageError(
            f"{output.name} cannot be written: results are CSV or NDJSON. End its name in .csv, .ndjson or .jsonl, "
            "also with .gz after it, or choose with --format."
        )
    return table_format(output) or table_format(rows) or "csv"


def _static_inputs(flock: DeclaredFlock, agent: str, texts: dict[str, str]) -> dict[str, msgspec.Raw]:
    return flock.agents[agent].input.from_text(texts) if agent in flock.agents else {}


@contextlib.contextmanager
def _process_for_rows() -> Iterator[None]:
    """In a process that does nothing else cells may be long, and the log is spared what the output says of a row."""
    logger, longest = logging.getLogger("flock.runs"), csv.field_size_limit(MAX_ROW_BYTES)
    logger.addFilter(_is_of_no_row)
    try:
        yield
    finally:
        logger.removeFilter(_is_of_no_row)
        csv.field_size_limit(longest)


def _is_of_no_row(record: logging.LogRecord) -> bool:
    return not hasattr(record, "run_id")


def _what_is_kept(state: Path) -> str:
    return f" What is done is kept in {state}: the same command goes on from there." if state.exists() else ""


def _summary(done: Batch, output: Path) -> str:
    completed = done.completed_items - done.failed_items - done.cancelled_items
    if completed == done.total_items:
        return f"{completed:,} of {completed:,} rows completed."
    where = "The results say" if output == STDOUT else f"In {output} 'error' says"
    return f"{completed:,} of {done.total_items:,} rows completed, and {done.failed_items:,} failed. {where} why."


def _print_check(check: BatchCheck, rows: Path) -> None:
    for row, extra, _ in check.rows:
        kept = f" keeps {bytes(extra).decode()}" if extra else ""
        click.echo(f"line {row.line}: {bytes(row.inputs).decode()}{kept}")
    if check.total_items > len(check.rows):
        click.echo("…")
    fitting = check.total_items - check.invalid_items
    click.echo(f"{fitting:,} of {check.total_items:,} rows in {rows} fit.")
    click.echo("".join(f"{line}\n" for line in _error_lines(check.errors)), nl=False)


def _listed(exc: InvalidData, rows: Path) -> str:
    if exc.errors[0].pointer == "/batch_inputs":
        return f"{rows} has no rows, so nothing was begun."
    return "\n".join([f"Nothing was started: {rows} does not fit:", *_error_lines(exc.errors)])


def _error_lines(errors: Sequence[FieldError]) -> list[str]:
    lines = [f"  {error}" for error in errors[:MAX_LISTED_ERRORS]]
    if len(errors) > len(lines):
        lines.append(f"  and {len(errors) - len(lines)} more, as far as it was read")
    return lines


if __name__ == "__main__":
    main()

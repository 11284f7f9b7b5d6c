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
import threading
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
from flock.agents.questions import check_answer
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
from flock.errors import CallError, DefinitionError, FieldError, FlockError, InvalidData
from flock.limits import Limits, enforced_by
from flock.options import MAX_SECONDS, Option, Options, option_of
from flock.rows.dialect import CSVDialect
from flock.rows.tables import MAX_ROW_BYTES, TableFormat, suffix_of, table_format
from flock.runs import MAX_COST, Batch, BatchOptions, Event, OnExtra, OnInvalid, Question, cost_in_words
from flock.web.auth import KEYS_VARIABLE, new_key, read_keys
from flock.web.options import AppOptions, is_host_name

__all__ = ["Seconds", "load_flock", "main", "options_of"]


# Loading a flock


def load_flock(target: str) -> DeclaredFlock:
    """Return the flock that *target* names: ``path/to/file.py[:name]`` or ``module[:name]``.

    Without a name, it is the flock called ``flock``, or else the only one in the module.

    Raises:
        click.ClickException: there is no such file, module or flock, or its code fails. The message lists the flocks
            of the module, or has the line that failed.
    """
    source, _, name = target.partition(":")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    except click.ClickException:
        raise
    except Exception as exc:
        raise click.ClickException(_line_and_reason(exc) or f"{source}: {_reason(exc)}") from exc
    flocks = {key: value for key, value in vars(module).items() if isinstance(value, DeclaredFlock)}
    if name in flocks:
        return flocks[name]
    if not name and ("flock" in flocks or len(flocks) == 1):
        return flocks.get("flock") or next(iter(flocks.values()))
    hint = f"It has: {', '.join(flocks)}." if flocks else "Add flock = Flock(...) at its top level."
    raise click.ClickException(f"{source} has no flock called {name or 'flock'!r}. {hint}")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise click.ClickException(f"There is no file {path}.")
    # As Python does for a script, so that it can import the modules beside it.
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and type hints look it up here
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
        raise click.ClickException(f"There is no module {name!r}. For a file, use its path, with .py.") from exc


PACKAGE = Path(__file__).parent.parent
#: Paths of code that is not the user's own.
LIBRARIES: Sequence[str | Path] = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    PACKAGE,
    PACKAGE.with_name("flockapi.py"),
)


def _line_and_reason(exc: Exception) -> str | None:
    """Return ``file:line: reason`` for the innermost line of the user's own code, or None if none of it has run."""
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
    """Serve agents as a REST API.

    TARGET names a flock: path/to/file.py or a module. Add :NAME if the flock is not called "flock".
    """


class Seconds(click.FloatRange):
    """A finite number of seconds. A plain FloatRange accepts nan."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a valid number of seconds.", param, ctx)
        return seconds


F = TypeVar("F", bound=Callable[..., Any])


def options_of(struct: type[Options], names: Collection[str] | None = None) -> Callable[[F], F]:
    """Add an option to a command for each field of *struct* that has a help text, limited to *names* if given."""

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
        return click.IntRange(option.minimum)
    return Seconds(0, MAX_SECONDS, min_open=not option.is_valid(0))


def _pop_fields(options: dict[str, Any], struct: type[Options]) -> dict[str, Any]:
    """Remove the fields of *struct* from *options*, and return them."""
    return {name: options.pop(name) for name in struct.__struct_fields__ if name in options}


def _check_host_names(context: click.Context, param: click.Parameter, hosts: Sequence[str]) -> Sequence[str]:
    for host in hosts:
        if not is_host_name(host):
            raise click.BadParameter(f"{host!r} is not a host name. Omit scheme and port, as in agents.example.")
    return hosts


model_option = click.option(
    "--model",
    envvar="FLOCK_MODEL",
    show_envvar=True,
    metavar="PROVIDER/MODEL",
    help="Model for agents without a model of their own, in place of the flock's. local/smollm2-135m needs no key.",
)

expose_errors_option = click.option(
    "--expose-errors", is_flag=True, help="Send the text of every exception to clients; for development."
)

log_json_option = click.option("--log-json", is_flag=True, help="Write the log as JSON, one object per line.")

payload_dir_option = click.option(
    "--payload-dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder for values that are too long for the Temporal cluster. The API and all workers must share it.",
)


@main.command()
@click.argument("target")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8344,
    show_default=True,
    help="Port to listen on; 0 selects a free one.",
)
@click.option("--server-name", default="Flock Server", show_default=True, help="Title of the pages.")
@click.option("--ui", "create_ui", is_flag=True, help="Serve the web page at /ui.")
@model_option
@click.option(
    "--temporal",
    metavar="HOST:PORT",
    help="Store runs and batches on this Temporal cluster. Processes of 'flockapi worker' execute them.",
)
@payload_dir_option
@click.option(
    "--store",
    default="flock.db",
    show_default=True,
    metavar="FILE",
    help="SQLite file that stores the runs. With :memory: they are lost when the server stops.",
)
@click.option(
    "--durability",
    type=click.Choice(["power", "process"]),
    default="power",
    show_default=True,
    help="What accepted runs survive: a power cut, or only a crash of the process, which is faster.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of processes that share the port and the store.",
)
@options_of(Limits)
@click.option(
    "--csv-dir",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="Folder from which clients may read a CSV file as a batch.  [default: clients cannot read files]",
)
@click.option(
    "--on-disconnect",
    type=click.Choice(["cancel", "continue"]),
    default="cancel",
    show_default=True,
    help="What happens to a synchronous run if its client disconnects.",
)
@expose_errors_option
@click.option(
    "--api-keys-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File of API keys, one NAME=KEY per line, in addition to FLOCK_API_KEYS. NAME:admin sees all runs.",
)
@click.option("--allow-anonymous", is_flag=True, help="Require no API key, even if other machines can connect.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    callback=_check_host_names,
    metavar="HOST",
    help="Additional host name, which a proxy forwards. Repeatable. Requests for other hosts are rejected with 421.",
)
@click.option(
    "--root-path",
    default="",
    metavar="PATH",
    help="Path prefix that a proxy removes from requests. Links begin with it.",
)
@click.option(
    "--forwarded-allow-ips",
    metavar="ADDRESSES",
    help="Proxies whose X-Forwarded-For and X-Forwarded-Proto are trusted, separated by commas; * trusts all.  "
    "[default: the variable FORWARDED_ALLOW_IPS, or 127.0.0.1]",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin whose pages may call the server from a browser. Repeatable.",
)
@options_of(ServerSettings)
@options_of(AppOptions)
@log_json_option
@click.option("--access-log", is_flag=True, help="Log each request. Each run that ends is logged in any case.")
@click.option(
    "--metrics/--no-metrics",
    default=None,
    help="Serve /metrics for Prometheus.  [default: on if prometheus-client is installed]",
)
@click.pass_context
def serve(
    context: click.Context, /, target: str, model: str | None, workers: int, api_keys_file: Path | None, **options: Any
) -> None:
    """Serve the flock TARGET over HTTP.

    If other machines can connect, directly or through a proxy, every request needs an API key. If no key is
    configured, one is generated and printed at the start. --allowed-host, --root-path and --forwarded-allow-ips mean
    that there is a proxy.
    """
    load = functools.partial(_load_with_model, target, model)
    if options["temporal"]:
        _check_options_for_temporal(context)
    elif options["payload_dir"]:
        raise click.UsageError("--payload-dir needs --temporal. An SQLite file stores long values itself.")
    try:
        own, limits = _pop_fields(options, ServerSettings), Limits(**_pop_fields(options, Limits))
        app = AppOptions(api_keys=_keys(api_keys_file), **options)
        settings = ServerSettings(app=app, limits=limits, **own)
        if workers == 1:
            serve_flock(load(), settings)
        elif settings.store == MEMORY and not settings.temporal:
            raise click.UsageError(
                "Several workers need a file to share their runs. Choose one with --store, or omit --workers."
            )
        else:
            serve_workers(load, workers, settings)
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc


#: Why an option of ``serve`` has no effect with a cluster, by the component that enforces the limit instead.
TEMPORAL_REASONS = {
    "cluster": "the cluster stores the runs",
    "namespace": "the namespace's retention applies",
    "worker": "pass it to flockapi worker",
}
NOT_WITH_TEMPORAL = {
    name: reason for component, reason in TEMPORAL_REASONS.items() for name in enforced_by(component)
} | {
    "store": TEMPORAL_REASONS["cluster"],
    "durability": TEMPORAL_REASONS["cluster"],
    "expose_errors": TEMPORAL_REASONS["worker"],
}


def _check_options_for_temporal(context: click.Context) -> None:
    """Raise UsageError for options that would have no effect."""
    for option in context.command.params:
        is_given = context.get_parameter_source(option.name or "") is click.core.ParameterSource.COMMANDLINE
        if is_given and option.name in NOT_WITH_TEMPORAL:
            reason = NOT_WITH_TEMPORAL[option.name]
            raise click.UsageError(f"{option.opts[0]} has no effect with --temporal: {reason}.")


def _keys(file: Path | None) -> dict[str, str] | None:
    """Return the keys of *file* and of the environment. Without a file, return None: the server reads the latter."""
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
    help="Address of the Temporal cluster. Namespace, TLS and API key come from TEMPORAL_NAMESPACE and similar "
    "variables.",
)
@payload_dir_option
@model_option
@options_of(Limits, enforced_by("worker"))
@options_of(WorkerSettings)
@expose_errors_option
@log_json_option
def worker(target: str, model: str | None, **options: Any) -> None:
    """Execute runs and batches of the flock TARGET from a Temporal cluster.

    'flockapi serve --temporal' accepts the runs. Start as many workers as the load needs, on any number of machines.
    They listen on no port.
    """
    try:
        settings = WorkerSettings(limits=Limits(**_pop_fields(options, Limits)), **options)
        run_worker(_load_with_model(target, model), settings)
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc


@main.command()
def key() -> None:
    """Print a new API key of 256 random bits."""
    click.echo(new_key())


@main.command()
@click.argument("target")
@model_option
def check(target: str, model: str | None) -> None:
    """Report problems that would make runs of the flock TARGET fail.

    Each missing key, model, provider, package or next agent is one line. 'flockapi serve' logs the same lines at the
    start. The check makes no network calls. The exit code is 0 if there are no problems, and 1 otherwise.
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
    help="One input. Repeatable. Plain text for a text input, JSON for any other.",
)
@click.option("--stream", is_flag=True, help="Print text as the agents write it, and then the result.")
@model_option
def run(target: str, agent: str, inputs: Sequence[str], stream: bool, model: str | None) -> None:
    """Run AGENT of the flock TARGET once, and print its result as JSON.

    If the agent asks a question, it is asked at the terminal.
    """
    flock = _load_with_model(target, model)
    texts, printer = _pairs(inputs, "-i", "KEY=VALUE"), _LivePrinter() if stream else None
    try:
        signature = flock.agents[agent].input if agent in flock.agents else None
        values = signature.from_text(texts) if signature else texts
        result = flock.run(agent, values, answer=_answer_on_terminal, on_event=printer)
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc
    finally:
        if printer is not None:
            printer.end_line()
    click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())


class _LivePrinter:
    """Prints the text of each field to stdout, and what else happens to stderr. Call it with each event of a run."""

    def __init__(self) -> None:
        self._field: tuple[int, str] | None = None

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.name == "call.started":
            self._print_note(f"{data['agent_name']} calls {data['name']}")
        elif event.name == "output.reset" and "call_id" not in data:
            self._print_note(f"{data['agent_name']} starts again")
        elif event.name == "output.delta" and "call_id" not in data:
            field = data["position"], data["field"]
            if field != self._field:
                self.end_line()
            self._field = field
            click.echo(data["text"], nl=False)

    def _print_note(self, text: str) -> None:
        self.end_line()
        click.secho(text, dim=True, err=True)

    def end_line(self) -> None:
        """End the line of the last text, if there is any."""
        if self._field is not None:
            click.echo()
            self._field = None


#: One question at a time; each is asked in a worker thread.
TERMINAL = threading.Lock()


def _answer_on_terminal(question: Question) -> Any:
    """Ask the person at the terminal until the answer fits. Plain text answers a question for a text."""
    if not sys.stdin.isatty():
        raise CallError(f"The agent asks a question. Run the command at a terminal to answer: {question.question}")
    schema = msgspec.json.decode(question.schema)
    is_text = schema.get("type") == "string"
    hint = "text" if is_text else f"JSON: {bytes(question.schema).decode()}"
    while True:
        with TERMINAL:
            text = click.prompt(f"{question.question} ({hint})", err=True)
        try:
            output = msgspec.Raw(msgspec.json.encode(text) if is_text else text.encode())
            check_answer(question, output)
            return msgspec.json.decode(output)
        except (InvalidData, msgspec.DecodeError) as exc:
            click.echo(str(exc), err=True)


def _pairs(given: Sequence[str], option: str, form: str) -> dict[str, str]:
    pairs = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not {form}.", param_hint=option)
        pairs[key] = value
    return pairs


#: Max row errors that are printed.
MAX_LISTED_ERRORS = 20
#: The conventional exit code after Ctrl-C.
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
    type=click.Choice(["csv", "ndjson"]),
    help="Format of the results.  [default: by the extension of the output, or of ROWS if the output has none]",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--max-workers",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Max rows running at the same time.",
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
    show_default=True,
    help="If a row is invalid: start nothing, or fail only that row.",
)
@click.option(
    "--on-extra",
    type=click.Choice(["reject", "ignore", "keep"]),
    default="reject",
    show_default=True,
    help="If a column is not an input: start nothing, drop the column, or copy it to the results.",
)
@click.option("--delimiter", default=",", show_default=True, metavar="CHAR", help="Delimiter of the cells in ROWS.")
@click.option(
    "--decimal", default=".", show_default=True, metavar="CHAR", help="Decimal separator (. or ,) of numbers in ROWS."
)
@click.option(
    "--encoding",
    default="utf-8",
    show_default=True,
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
    help="Start no more rows after that many US dollars. Run the command again with more to continue.",
)
@click.option(
    "--usage",
    "with_usage",
    is_flag=True,
    help="Add input_tokens, output_tokens and cost of each row to the results.",
)
@click.option(
    "--escape-formulas/--no-escape-formulas",
    default=True,
    show_default=True,
    help="Put a ' before cells that a spreadsheet would execute as formulas.",
)
@click.option(
    "--store",
    "state",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="SQLite file that stores finished rows until the end.  [default: the output's name plus .flock.db]",
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
    max_cost: float | None,
    with_usage: bool,
    escape_formulas: bool,
    state: Path | None,
) -> None:
    """Run AGENT on each row of a file, and write the results to a file.

    ROWS is CSV with a header, typed by the agent's signature, or NDJSON. Its name ends in .csv, .ndjson or .jsonl,
    optionally followed by .gz. The results are CSV with the inputs, the outputs, status and error, or NDJSON.

    If the command was stopped or killed, run it again. It resumes, and finished rows do not run again. The exit code is
    0 if all rows completed, and 1 if some failed. The column "error" has the reason. With --dry-run, the exit code is 0
    if the rows would be accepted, and 1 otherwise.

    With --max-cost, no more rows start when that much is spent, and the exit code is 1. To continue, run the command
    again with a higher --max-cost.
    """
    if output is None:
        if not is_dry_run:
            raise click.MissingParameter(param_hint="'-o' / '--output'", param_type="option")
        output = STDOUT
    state = state or Path(f"{rows.name if output == STDOUT else output}.flock.db")
    _check_paths(rows, output, state)
    flock = _load_with_model(target, model)
    try:
        job = BatchFile(
            agent_name=agent,
            rows=rows,
            output=None if output == STDOUT else output,
            format=format_ or _format_of(output, rows),
            force=force,
            state=state,
            options=BatchOptions(max_workers=max_workers, timeout_s=timeout_s, max_cost=max_cost),
            on_invalid=on_invalid,
            input_mapping={key: name or None for key, name in _pairs(mapped, "--map", "COLUMN=INPUT").items()},
            static_inputs=_static_inputs(flock, agent, _pairs(static, "--static", "KEY=VALUE")),
            on_extra=on_extra,
            dialect=CSVDialect(delimiter=delimiter.replace(r"\t", "\t"), decimal=decimal, encoding=encoding),
            escape_formulas=escape_formulas,
            with_usage=with_usage,
        )
        if is_dry_run:
            with _batch_process():
                check = anyio.run(check_batch_file, flock, job)
            _print_check(check, rows)
            sys.exit(0 if check.ok else 1)
        with _batch_process():
            done = anyio.run(run_batch_file, flock, job, sys.stdout.buffer, _print_stderr)
        _print_stderr(_summary(done, output) if done.error_type is None else f"{done.error}{_resume_hint(state)}")
        exit_code = 0 if done.completed_items and not (done.failed_items or done.cancelled_items) else 1
    except KeyboardInterrupt:
        _print_stderr(f"Stopped.{_resume_hint(state)}")
        exit_code = EXIT_INTERRUPTED
    except InvalidData as exc:
        raise click.ClickException(_rejection(exc, rows)) from exc
    except DefinitionError as exc:
        raise click.UsageError(str(exc)) from exc
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc
    except BlockingIOError as exc:
        raise click.ClickException(
            f"Another command is using {state}. Wait until it ends, or choose another file with --store."
        ) from exc
    except BrokenPipeError:
        _print_stderr(f"The reader closed the pipe before the end of the results.{_resume_hint(state)}")
        raise
    except OSError as exc:
        path = exc.filename or output
        raise click.ClickException(f"{path}: {exc.strerror or exc}.{_resume_hint(state)}") from exc
    abandon_busy_threads(exit_code)
    sys.exit(exit_code)


STDOUT = Path("-")


def _print_stderr(text: str) -> None:
    click.echo(text, err=True)


def _check_paths(rows: Path, output: Path, state: Path) -> None:
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


def _format_of(output: Path, rows: Path) -> TableFormat:
    """Return the format of the results. Raises UsageError if the output's extension is not CSV or NDJSON."""
    if suffix_of(output) and table_format(output) is None:
        raise click.UsageError(
            f"The extension of {output.name} is not supported. Results are CSV or NDJSON. Use .csv, .ndjson or .jsonl, "
            "optionally followed by .gz, or choose a format with --format."
        )
    return table_format(output) or table_format(rows) or "csv"


def _static_inputs(flock: DeclaredFlock, agent: str, texts: dict[str, str]) -> dict[str, msgspec.Raw]:
    return flock.agents[agent].input.from_text(texts) if agent in flock.agents else {}


@contextlib.contextmanager
def _batch_process() -> Iterator[None]:
    """Allow long cells, and drop the log records of single rows, whose errors are in the output."""
    logger, previous_limit = logging.getLogger("flock.runs"), csv.field_size_limit(MAX_ROW_BYTES)
    logger.addFilter(_has_no_run_id)
    try:
        yield
    finally:
        logger.removeFilter(_has_no_run_id)
        csv.field_size_limit(previous_limit)


def _has_no_run_id(record: logging.LogRecord) -> bool:
    return not hasattr(record, "run_id")


def _resume_hint(state: Path) -> str:
    return f" Finished rows are stored in {state}. To resume, run the same command again." if state.exists() else ""


def _summary(done: Batch, output: Path) -> str:
    completed = done.completed_items - done.failed_items - done.cancelled_items
    cost = f" They cost {cost_in_words(done.usage)}." if done.usage is not None and done.usage.cost is not None else ""
    if completed == done.total_items:
        return f"{completed:,} of {completed:,} rows completed.{cost}"
    results = "the results" if output == STDOUT else output
    counts = f"{completed:,} of {done.total_items:,} rows completed, and {done.failed_items:,} failed."
    return f"{counts}{cost} For the reasons, see 'error' in {results}."


def _print_check(check: BatchCheck, rows: Path) -> None:
    for row, extra, _ in check.rows:
        kept = f" keeps {bytes(extra).decode()}" if extra else ""
        click.echo(f"line {row.line}: {bytes(row.inputs).decode()}{kept}")
    if check.total_items > len(check.rows):
        click.echo("…")
    valid = check.total_items - check.invalid_items
    click.echo(f"{valid:,} of {check.total_items:,} rows in {rows} are valid.")
    click.echo("".join(f"{line}\n" for line in _error_lines(check.errors)), nl=False)


def _rejection(exc: InvalidData, rows: Path) -> str:
    if exc.errors[0].pointer == "/max_cost":
        return exc.errors[0].detail
    if exc.errors[0].pointer == "/batch_inputs":
        return f"{rows} has no rows, so nothing was started."
    return "\n".join([f"Nothing was started, since {rows} is invalid:", *_error_lines(exc.errors)])


def _error_lines(errors: Sequence[FieldError]) -> list[str]:
    lines = [f"  {error}" for error in errors[:MAX_LISTED_ERRORS]]
    if len(errors) > len(lines):
        lines.append(f"  and {len(errors) - len(lines)} more in the part that was read")
    return lines


if __name__ == "__main__":
    main()

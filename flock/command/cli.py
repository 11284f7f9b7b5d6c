"""The command ``flockapi``."""

import functools
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from flock import __version__
from flock.agents.checks import problems
from flock.agents.questions import check_answer
from flock.command.arguments import (
    check_host_names,
    expose_errors_option,
    files_dir_option,
    log_json_option,
    model_option,
    options_of,
    pairs,
    payload_dir_option,
    pop_fields,
)
from flock.command.server import ServerSettings, WorkerSettings, passed_listener, run_worker, serve_flock, serve_workers
from flock.command.stdio import serve_stdio, state_file, take_streams
from flock.command.target import load_flock
from flock.command.terminal import Commands, echo
from flock.errors import CallError, InvalidData
from flock.limits import Limits, enforced_by
from flock.runs import MAX_COST, Event, Question
from flock.runs.text import for_terminal
from flock.store.database import MEMORY
from flock.web.auth import KeyRing, new_key, new_webhook_secret, with_budget
from flock.web.options import PROTOCOL_MODULES, AppOptions


@click.group(
    cls=Commands,
    modules=["batch", "evaluate"],
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="flockapi")
def main() -> None:
    """Serve agents as a REST API.

    TARGET names a flock: path/to/file.py or a module. Add :NAME if the flock is not called "flock".
    """


def _protocols(context: click.Context, param: click.Parameter, names: Sequence[str]) -> Sequence[str]:
    """Return the protocols that an option names. Raises BadParameter if it names none of them and another."""
    if "none" in names and len(names) > 1:
        raise click.BadParameter("'none' cannot be combined with another protocol.")
    return () if "none" in names else names


@main.command()
@click.argument("target")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8344, help="Port to listen on; 0 selects a free one.")
@click.option("--server-name", default="Flock Server", help="Title of the pages.")
@click.option("--ui", "create_ui", is_flag=True, help="Serve the web page at /ui.")
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice([*PROTOCOL_MODULES, "none"]),
    multiple=True,
    default=list(PROTOCOL_MODULES),
    callback=_protocols,
    help="Protocol of other clients to serve beside the REST API. Repeatable.",
)
@model_option
@click.option(
    "--temporal",
    metavar="HOST:PORT",
    help="Store runs and batches on this Temporal cluster. Processes of 'flockapi worker' execute them.",
)
@payload_dir_option
@files_dir_option
@click.option(
    "--store",
    default="flock.db",
    metavar="FILE",
    help="SQLite file that stores the runs. With :memory: they are lost when the server stops.",
)
@click.option(
    "--durability",
    type=click.Choice(["power", "process"]),
    default="power",
    help="What accepted runs survive: a power cut, or only a crash of the process, which is faster.",
)
@click.option(
    "--workers", type=click.IntRange(1), default=1, help="Number of processes that share the port and the store."
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
    help="What happens to a synchronous run if its client disconnects.",
)
@expose_errors_option
@click.option(
    "--api-keys-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File of API keys, one NAME=KEY per line, in addition to FLOCK_API_KEYS. NAME:admin sees all runs. SIGHUP "
    "reads it again.",
)
@click.option("--allow-anonymous", is_flag=True, help="Require no API key, even if other machines can connect.")
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    callback=check_host_names,
    metavar="HOST",
    help="Additional host name, which a proxy forwards. Repeatable. Requests for other hosts are rejected with 421.",
)
@click.option(
    "--root-path",
    default="",
    show_default=False,
    metavar="PATH",
    help="Path prefix that a proxy removes from requests. Links begin with it.",
)
@click.option(
    "--public-url",
    metavar="URL",
    help="Address at which clients reach the server, for cards of A2A and URLs of agents.  [default: the host of each "
    "request]",
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
@click.option(
    "--webhook-url",
    metavar="URL",
    help="Where the events of runs and batches are sent, signed with the secrets in FLOCK_WEBHOOK_SECRETS, in place of "
    "the flock's address.",
)
@options_of(ServerSettings)
@options_of(AppOptions)
@log_json_option
@click.option(
    "--audit",
    metavar="FILE",
    help="File to which answers, retries, cancellations, deletions, and changes of keys and budgets are appended as "
    "JSON, one object per line. If it was moved, it is created again.",
)
@click.option("--access-log", is_flag=True, help="Log each request. Each run that ends is logged in any case.")
@click.option(
    "--metrics/--no-metrics",
    default=None,
    help="Serve /metrics for Prometheus.  [default: on if prometheus-client is installed]",
)
@click.pass_context
def serve(context: click.Context, /, target: str, model: str | None, workers: int, **options: Any) -> None:
    """Serve the flock TARGET over HTTP.

    If other machines can connect, directly or through a proxy, every request needs an API key. If no key is
    configured, one is generated and printed at the start. --allowed-host, --root-path, --public-url and
    --forwarded-allow-ips mean that there is a proxy. Traces are exported as the OTEL_* variables say.
    """
    load = functools.partial(load_flock, target, model)
    if options["temporal"]:
        _check_options_for_temporal(context)
    elif options["payload_dir"]:
        raise click.UsageError("--payload-dir needs --temporal. An SQLite file stores long values itself.")
    elif options["files_dir"]:
        raise click.UsageError("--files-dir needs --temporal. Otherwise, files are stored beside the SQLite file.")
    own, limits = pop_fields(options, ServerSettings), Limits(**pop_fields(options, Limits))
    settings = ServerSettings(app=AppOptions(**options), limits=limits, **own)
    if workers == 1:
        serve_flock(load(), settings, passed_listener())
    elif settings.store == MEMORY and not settings.temporal:
        raise click.UsageError(
            "Several workers need a file to share their runs. Choose one with --store, or omit --workers."
        )
    else:
        serve_workers(load, workers, settings)


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
@files_dir_option
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
    settings = WorkerSettings(limits=Limits(**pop_fields(options, Limits)), **options)
    run_worker(load_flock(target, model), settings)


@main.command()
@click.option("--name", help="Print NAME=KEY, a line of the file of API keys. By default the name of the first role.")
@click.option("--admin", is_flag=True, help="Its principal is an admin.")
@click.option("--role", "roles", multiple=True, help="A role of its principal, for questions that name it. Repeatable.")
@click.option(
    "--max-cost-per-day",
    type=click.FloatRange(0, MAX_COST, min_open=True),
    help="US dollars that the runs of its principal may cost in a day. It needs --name.",
)
def key(name: str | None, admin: bool, roles: tuple[str, ...], max_cost_per_day: float | None) -> None:
    """Print a new API key of 256 random bits."""
    made = new_key()
    if name is None and max_cost_per_day is not None:
        raise click.UsageError("--max-cost-per-day is a part of the name of a key. Add --name NAME.")
    if name is None and not roles and not admin:
        click.echo(made)
        return
    name = ":role:".join([f"{name or (roles[0] if roles else 'admin')}{':admin' if admin else ''}", *roles])
    name = with_budget(name, max_cost_per_day)
    KeyRing({name: made})  # raises if the name or a role is invalid
    click.echo(f"{name}={made}")


@main.group()
def webhook() -> None:
    """Set up webhooks."""


@webhook.command()
def secret() -> None:
    """Print a new secret that signs webhooks, of 256 random bits."""
    click.echo(new_webhook_secret())


@main.command()
@click.argument("target")
@model_option
@click.option(
    "--store", metavar="FILE", help="SQLite file that stores the runs.  [default: one in the user's state folder]"
)
@log_json_option
def mcp(target: str, model: str | None, store: str | None, log_json: bool) -> None:
    """Serve the flock TARGET to a host of the Model Context Protocol that starts this command.

    Each agent is a tool. Requests come from stdin, responses go to stdout, and the log to stderr. The command ends with
    its input.
    """
    streams = take_streams()  # before the program is imported, which may print
    serve_stdio(load_flock(target, model), streams, store=store or state_file(target), log_json=log_json)


@main.command()
@click.argument("target")
@model_option
def check(target: str, model: str | None) -> None:
    """Report problems that would make runs of the flock TARGET fail.

    Each missing key, model, provider, package or next agent is one line. 'flockapi serve' logs the same lines at the
    start. The check makes no network calls. The exit code is 0 if there are no problems, and 1 otherwise.
    """
    flock = load_flock(target, model)
    found = problems(flock.agents, flock.model)
    for problem in found:
        echo(problem)
    if found:
        sys.exit(1)
    echo(f"{', '.join(flock.agents)}: nothing is missing.")


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

    If the agent asks a question, it is asked at the terminal. For an approval, the arguments of the tool are shown.
    """
    flock = load_flock(target, model)
    texts, printer = pairs(inputs, "-i", "KEY=VALUE"), _LivePrinter() if stream else None
    try:
        signature = flock.agents[agent].input if agent in flock.agents else None
        values = signature.from_text(texts) if signature else texts
        result = flock.run(agent, values, on_question=_answer_on_terminal, on_event=printer)
    finally:
        if printer is not None:
            printer.end_line()
    echo(msgspec.json.format(msgspec.json.encode(result)).decode())


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
            echo(data["text"], nl=False)

    def _print_note(self, text: str) -> None:
        self.end_line()
        echo(text, dim=True, err=True)

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
            if question.arguments is not msgspec.UNSET:
                echo(msgspec.json.format(question.arguments).decode(), err=True)
            text = click.prompt(for_terminal(f"{question.question} ({hint})"), err=True)
        try:
            output = msgspec.Raw(msgspec.json.encode(text) if is_text else text.encode())
            check_answer(question, output)
            return msgspec.json.decode(output)
        except (InvalidData, msgspec.DecodeError) as exc:
            echo(str(exc), err=True)

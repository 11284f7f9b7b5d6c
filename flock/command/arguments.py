"""Arguments that several commands have in common."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import click
import msgspec

from flock.options import MAX_SECONDS, Option, Options, option_of
from flock.web.options import is_host_name


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
                command = click.option(
                    f"--{field.name.removesuffix('_s').replace('_', '-')}",
                    field.name,
                    type=_type_of(option),
                    default=field.default,
                    metavar=option.unit,
                    help=option.help,
                )(command)
        return command

    return add


def _type_of(option: Option) -> click.IntRange | Seconds:
    if option.unit == "N":
        return click.IntRange(option.minimum)
    return Seconds(0, MAX_SECONDS, min_open=not option.is_valid(0))


def pop_fields(options: dict[str, Any], struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Remove the fields of *struct* from *options*, and return them."""
    return {name: options.pop(name) for name in struct.__struct_fields__ if name in options}


def check_host_names(context: click.Context, param: click.Parameter, hosts: Sequence[str]) -> Sequence[str]:
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

files_dir_option = click.option(
    "--files-dir",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder for files in the inputs of runs on the Temporal cluster. The API and all workers must share it.",
)


def pairs(given: Sequence[str], option: str, form: str) -> dict[str, str]:
    pairs = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not {form}.", param_hint=option)
        pairs[key] = value
    return pairs

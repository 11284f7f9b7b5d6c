"""Output of the commands. Text of models, tools, rows and clients may contain codes that control a terminal."""

import codecs
import importlib
import io
import logging
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import click

from flock.errors import FlockError
from flock.runs.text import for_terminal


def echo(text: str, *, nl: bool = True, err: bool = False, dim: bool = False) -> None:
    """Print *text* with its control characters escaped. In a file or a pipe, stdout gets it as it is."""
    is_raw = not err and not sys.stdout.isatty()
    text = text if is_raw else for_terminal(text)
    click.echo(click.style(text, dim=True) if dim else text, nl=nl, err=err, color=True if is_raw else None)


class TerminalBytes(io.BytesIO):
    """A file that prints UTF-8 as ``echo`` prints text."""

    def __init__(self) -> None:
        super().__init__()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, data: Any) -> int:
        echo(self._decoder.decode(data), nl=False)
        return len(data)


class Commands(click.Group):
    """A group of commands. It prints a FlockError as a message, and escapes messages, log records and tracebacks.

    Args:
        modules: commands that are in a module of their own name, which a server needs not load.
    """

    def __init__(self, *args: Any, modules: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self._modules})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._modules and cmd_name not in self.commands:
            self.add_command(getattr(importlib.import_module(f"flock.command.{cmd_name}"), cmd_name))
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        sys.excepthook = _print_traceback
        if logging.lastResort is not None:  # it prints the records of commands that set up no logging
            logging.lastResort.setFormatter(_Formatter())
        try:
            return super().invoke(ctx)
        except FlockError as exc:
            raise click.ClickException(for_terminal(str(exc))) from exc
        except click.ClickException as exc:
            vars(exc)["message"] = for_terminal(exc.message)  # its subclasses show it in different ways
            raise


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def _print_traceback(type_: type[BaseException], exc: BaseException, where: TracebackType | None) -> None:
    echo("".join(traceback.format_exception(type_, exc, where)), nl=False, err=True)

"""The command ``flockapi``, and our own server, which ``Flock.start_api`` uses too."""

import contextlib
import copy
import importlib
import importlib.util
import logging
import math
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import msgspec
import uvicorn
import uvicorn.config

from flock import __version__
from flock.core import Flock
from flock.errors import FlockError
from flockapi import FlockAPI, create_app

__all__ = ["load_flock", "main", "serve_flock"]

logger = logging.getLogger("flock.server")

#: How long the answers to interrupted runs may take, in seconds; then uvicorn cuts them off.
ANSWER_TIMEOUT_S = 5
#: How long a worker thread may take to end that has nothing to do, in seconds.
THREAD_TIMEOUT_S = 1


def serve_flock(
    flock: Flock,
    *,
    host: str = "127.0.0.1",
    port: int = 8344,
    server_name: str = "Flock Server",
    create_ui: bool = False,
    expose_errors: bool = False,
    drain_timeout_s: float = 20,
    store: str = "flock.db",
) -> None:
    """Serve *flock* with uvicorn until SIGINT or SIGTERM. It sets up logging, as only the program's owner should.

    Args:
        drain_timeout_s: how long runs that somebody waits for may go on then; after it they end as interrupted.
    """
    log_config: dict[str, Any] = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log_config["loggers"]["flock"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    app = create_app(flock, server_name=server_name, expose_errors=expose_errors, store=store)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=log_config,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(drain_timeout_s + ANSWER_TIMEOUT_S),
    )
    if create_ui:
        logger.warning("create_ui: this version has no web page yet; /docs can run agents from a browser.")
    if host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("Listening on %s without a key: whoever reaches this port can run these agents.", host)
    if not flock.agents:
        logger.warning("This flock has no agents yet: add one with flock.add_agent(...).")
    kept = "in memory only" if store == ":memory:" else f"in {Path(store).resolve()}"
    agents = ", ".join(flock.agents) or "no agents"
    logger.info("%s serves %s. Docs: /docs and /redoc. Runs are kept %s.", server_name, agents, kept)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the way to stop it, and no error
        _Server(config, app, drain_timeout_s).run()
    _leave_busy_threads()


class _Server(uvicorn.Server):
    """uvicorn alone closes its listener first; this one goes on answering until the work has ended or is left."""

    def __init__(self, config: uvicorn.Config, app: FlockAPI, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_timeout_s = drain_timeout_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._app.engine.drain(self._drain_timeout_s)
        await super().shutdown(sockets)


def _leave_busy_threads() -> None:
    """Do not wait at exit for functions that do not return; their runs have ended as interrupted."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("AnyIO worker")]
    for thread in threads:
        thread.join(THREAD_TIMEOUT_S)
    if any(thread.is_alive() for thread in threads):
        logger.warning("Leaving without functions that have not returned.")
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


# The flock that a command is about


def load_flock(target: str) -> Flock:
    """The flock that *target* names: ``path/to/file.py[:name]`` or ``module[:name]``, and ``flock`` where no name is.

    Raises:
        click.ClickException: there is no such file, module or flock; it says what there is.
    """
    place, _, name = target.partition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    flocks = {key: value for key, value in vars(module).items() if isinstance(value, Flock)}
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


# The commands


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="flockapi")
def main() -> None:
    """Put agents behind a REST API.

    TARGET names a flock: path/to/file.py, or module, with :NAME behind it unless the flock is called "flock".
    """


model_option = click.option(
    "--model",
    envvar="FLOCK_MODEL",
    show_envvar=True,
    metavar="PROVIDER/MODEL",
    help="Model for the agents that name none, in place of the flock's own. local/smollm2-135m needs no key.",
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
@click.option("--server-name", default="Flock Server", show_default=True, help="Title of the docs pages.")
@model_option
@click.option(
    "--store",
    default="flock.db",
    show_default=True,
    metavar="FILE",
    help="SQLite file that keeps the runs; :memory: keeps them as long as the server runs.",
)
@click.option("--expose-errors", is_flag=True, help="Show the text of any exception to clients; for development.")
@click.option(
    "--drain-timeout",
    "drain_timeout_s",
    type=click.FloatRange(0),
    default=20,
    show_default=True,
    metavar="SECONDS",
    help="How long runs that somebody waits for may go on when the server is told to stop.",
)
def serve(target: str, model: str | None, **options: Any) -> None:
    """Serve the flock that TARGET names over HTTP."""
    flock = load_flock(target)
    flock.model = model or flock.model
    serve_flock(flock, **options)


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
    flock = load_flock(target)
    flock.model = model or flock.model
    texts = {}
    for pair in inputs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE.", param_hint="-i")
        texts[key] = value
    try:
        signature = flock.agents[agent].input if agent in flock.agents else None
        result = flock.run(agent, signature.from_text(texts) if signature else texts)
    except FlockError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(msgspec.json.format(msgspec.json.encode(result)).decode())


if __name__ == "__main__":
    main()

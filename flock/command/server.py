"""Our own server: uvicorn that stops in order, in one process or in several on one socket and one store."""

import asyncio
import contextlib
import copy
import functools
import gc
import ipaddress
import itertools
import logging
import logging.config
import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn

import anyio
import msgspec
import uvicorn
import uvicorn.config
import uvicorn.logging

from flock.agents.checks import warn_of_problems
from flock.agents.llm import ModelClient
from flock.command.connection import Connection
from flock.declared import DeclaredFlock
from flock.engine.store import MEMORY, Durability, Store
from flock.errors import DefinitionError
from flock.limits import Limits
from flock.options import Options, seconds, whole
from flock.runs import Engine, one_line
from flock.web.auth import ADMIN, KEYS_VARIABLE, keys_from_environment, new_key
from flock.web.options import AppOptions
from flockapi import FlockAPI

if TYPE_CHECKING:
    from flock.temporal import TemporalEngine

__all__ = [
    "ServerSettings",
    "WorkerSettings",
    "abandon_busy_threads",
    "run_worker",
    "serve_flock",
    "serve_workers",
    "tune_gc",
]

logger = logging.getLogger("flock.server")

#: What ``Host`` may say where only this machine can connect, and needs no key.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
#: How long the answers to interrupted runs may take, in seconds; then uvicorn cuts them off.
ANSWER_TIMEOUT_S = 5
#: How many connections are accepted in one turn of the event loop.
ACCEPTED_IN_A_TURN = 16
#: How many files and sockets a server may have open, where the system lets it.
OPEN_FILES = 65_536
#: How long a worker thread may take to end that has nothing to do, in seconds.
THREAD_TIMEOUT_S = 1
#: How long after its death a worker is replaced, in seconds.
RESTART_INTERVAL_S = 1


class ServerSettings(Options, frozen=True, kw_only=True):
    """How a flock is served; the options of ``flockapi serve`` have the same names.

    Attributes:
        limits: the bounds of the engine.
        app: the options of ``create_app``, but for those that the server sets itself: ``engine``, ``auth`` and
            ``allowed_hosts``.
        store, durability, expose_errors: see ``Store`` and ``EmbeddedEngine``.
        temporal: ``host:port`` of a Temporal cluster that keeps the runs in place of a store, for workers to carry out.
        payload_dir: a folder for what is too long for it; see ``TemporalEngine``.
        allow_anonymous: make no key if none is named and others can connect, and let ``Host`` say anything.
        allowed_hosts: names that ``Host`` may say beside those of this machine, if a proxy forwards them; others are
            answered with 421. This, and each of the next two, says that others can connect, so a key is needed.
        root_path: the path that a proxy cuts off before it forwards a request; links begin with it.
        forwarded_allow_ips: addresses of proxies, separated by commas, whose ``X-Forwarded-For`` and
            ``X-Forwarded-Proto`` are trusted; ``*`` is all. If None, uvicorn's default: ``FORWARDED_ALLOW_IPS`` of the
            environment, or 127.0.0.1.
        log_json: write the log as JSON, one object a line.
    """

    TAKEN_BY: ClassVar[str] = "server"

    host: str = "127.0.0.1"
    port: int = 8344
    app: AppOptions = AppOptions()
    limits: Limits = Limits()
    temporal: str | None = None
    payload_dir: str | None = None
    store: str = "flock.db"
    durability: Durability = "power"
    #: How long runs may continue when the server is told to stop. After that, asynchronous ones are left for the next
    #: start, and the others end as interrupted.
    drain_timeout_s: Annotated[
        float,
        seconds("How long runs may continue after the server is asked to stop.", may_be_0=True),
    ] = 20
    expose_errors: bool = False
    allow_anonymous: bool = False
    allowed_hosts: Sequence[str] = ()
    root_path: str = ""
    forwarded_allow_ips: str | None = None
    #: More at a time are answered with 503; connections that were admitted before continue.
    max_connections: Annotated[
        int,
        whole(1, "Connections at the same time, in each process; new ones beyond them are answered with 503."),
    ] = 20_000
    #: See ``Connection``.
    write_timeout_s: Annotated[
        float, seconds("A client that reads nothing of its answer for so long loses its connection.")
    ] = 30
    log_json: bool = False


class WorkerSettings(Options, frozen=True, kw_only=True):
    """How a worker works; the options of ``flockapi worker`` have the same names. See ``TemporalWorker``."""

    TAKEN_BY: ClassVar[str] = "worker"

    temporal: str
    payload_dir: str | None = None
    limits: Limits = Limits()
    drain_timeout_s: Annotated[
        float,
        seconds(
            "How long steps may continue after the worker is asked to stop; then another worker starts them again.",
            may_be_0=True,
        ),
    ] = 20
    expose_errors: bool = False
    log_json: bool = False


def serve_flock(flock: DeclaredFlock, settings: ServerSettings) -> None:
    """Serve *flock* until SIGINT or SIGTERM.

    It sets up logging, as only the program's owner should.

    Raises: StoreError where the store cannot be used.
    """
    settings = _closed(settings)
    config = _config(_app(flock, settings), settings)
    anyio.run(_open_once, flock, settings)
    _say_what_is_served(flock, settings)
    _serve(config, settings)


def serve_workers(load: Callable[[], DeclaredFlock], workers: int, settings: ServerSettings) -> None:
    """Serve in *workers* processes until SIGINT or SIGTERM. One that dies is replaced; its runs go on in the others.

    Args:
        load: makes the flock; called in each process, so it must be a function that can be pickled.

    Raises: StoreError where the store cannot be used.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # and not without tidying up
    with _metrics_folder():
        sys.exit(_serve_workers(load, workers, settings))


@contextlib.contextmanager
def _metrics_folder() -> Iterator[None]:
    """Where workers keep what they count, to show one sum of it; prometheus_client looks when it is imported."""
    with tempfile.TemporaryDirectory(prefix="flockapi-metrics-") as folder:
        used = os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        try:
            yield
        finally:
            if used == folder:
                del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def _serve_workers(load: Callable[[], DeclaredFlock], workers: int, settings: ServerSettings) -> int:
    """As ``serve_workers``; the exit code."""
    flock, settings = load(), _closed(settings)
    app = _app(flock, settings)
    config = _config(app, settings)
    anyio.run(_open_once, flock, settings)
    _say_what_is_served(flock, settings)
    app.warn_of_problems()
    listener = _listen(settings, config.backlog)
    told_to_stop, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the byte in the socket says it
    start = functools.partial(_start_worker, load, settings, listener)
    return _keep_running(start, workers, told_to_stop, forget=app.metrics.mark_process_dead if app.metrics else None)


def _listen(settings: ServerSettings, backlog: int) -> socket.socket:
    """Listen before any worker does: whoever connects now waits for one. uvicorn alone says so before it does so."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=backlog)
    except OSError as exc:
        _say_that_it_cannot_listen(settings.host, settings.port, exc)
        sys.exit(1)
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    logger.info("Running on http://%s:%d (Press CTRL+C to quit)", host, listener.getsockname()[1])
    return listener


def _say_that_it_cannot_listen(host: str, port: int, exc: OSError) -> None:
    reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror  # the resolver has its own numbers
    remedy = "Choose another port with --port, or another address with --host (port= and host= of start_api)."
    logger.error("Cannot listen on %s, port %d: %s. %s", host, port, reason, remedy)


def _keep_running(
    start: Callable[[], SpawnProcess],
    workers: int,
    told_to_stop: socket.socket,
    forget: Callable[[int | None], None] | None,
) -> int:
    """Replace workers that die, until told to stop, or until one cannot start, as no other could; its exit code.

    *forget* is called with the id of a process that is gone.
    """
    processes = [start() for _ in range(workers)]
    exit_code = 0
    while not exit_code:
        ready = multiprocessing.connection.wait([told_to_stop, *(process.sentinel for process in processes)])
        if told_to_stop in ready:
            break
        for process in [process for process in processes if process.sentinel in ready]:
            process.join()
            processes.remove(process)
            if forget is not None:
                forget(process.pid)
            if process.exitcode == uvicorn.config.STARTUP_FAILURE:
                exit_code = uvicorn.config.STARTUP_FAILURE
            elif not multiprocessing.connection.wait([told_to_stop], RESTART_INTERVAL_S):
                logger.warning(
                    "Worker %s is gone (exit code %s); another takes its place.", process.pid, process.exitcode
                )
                processes.append(start())
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
    return exit_code


def _start_worker(load: Callable[[], DeclaredFlock], settings: ServerSettings, listener: socket.socket) -> SpawnProcess:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(load, settings, listener))
    process.start()
    return process


def _work(load: Callable[[], DeclaredFlock], settings: ServerSettings, listener: socket.socket) -> None:
    """What a worker process does."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        config = _config(_app(load(), settings), settings)
        logging.getLogger("flock.checks").disabled = True  # the parent process has said it, once for all
    except Exception:
        traceback.print_exc()
        sys.exit(uvicorn.config.STARTUP_FAILURE)
    _serve(config, settings, [listener])


def _stop_with_parent() -> None:
    """Nobody could stop the workers of a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _closed(settings: ServerSettings) -> ServerSettings:
    """*settings* with the keys that are named, or with one that is made and printed where others can connect."""
    if settings.app.api_keys is None:
        settings = _with_keys(settings, keys_from_environment())
    if settings.app.api_keys is not None or settings.allow_anonymous or _is_private(settings):
        return settings
    key = new_key()
    print(
        "Others can reach this server, and no key is named. Every request needs this one, made for this start:\n\n"
        f"    Authorization: Bearer {key}\n\n"
        f"Name your own with {KEYS_VARIABLE}='me=...' (flockapi key makes one), or let everybody in with "
        "--allow-anonymous.\n",
        file=sys.stderr,
        flush=True,
    )
    return _with_keys(settings, {f"owner{ADMIN}": key})


def _with_keys(settings: ServerSettings, api_keys: Mapping[str, str] | None) -> ServerSettings:
    return msgspec.structs.replace(settings, app=msgspec.structs.replace(settings.app, api_keys=api_keys))


def _names(settings: ServerSettings) -> Collection[str] | None:
    """What ``Host`` may say: if no key is needed, a foreign page must not get here by a name that leads here."""
    is_open = settings.app.api_keys is None and not settings.allow_anonymous
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return {*LOOPBACK, host, *settings.allowed_hosts} if is_open or settings.allowed_hosts else None


def _is_private(settings: ServerSettings) -> bool:
    """Whether only programs on this machine send requests: it listens to no other, and no proxy forwards any."""
    is_proxied = settings.allowed_hosts or settings.root_path or settings.forwarded_allow_ips
    return _is_loopback(settings.host) and not is_proxied


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _app(flock: DeclaredFlock, settings: ServerSettings) -> FlockAPI:
    engine = _temporal_engine(flock, settings) if settings.temporal else _embedded_engine(flock, settings)
    options = msgspec.structs.replace(
        settings.app,
        engine=engine,
        auth="anybody" if settings.app.api_keys is None else None,  # what holds without keys is logged at the start
        allowed_hosts=_names(settings),
    )
    return FlockAPI(flock, options)


def _embedded_engine(flock: DeclaredFlock, settings: ServerSettings) -> Engine:
    return flock.engine(
        store=settings.store,
        durability=settings.durability,
        limits=settings.limits,
        expose_errors=settings.expose_errors,
    )


def _temporal_engine(flock: DeclaredFlock, settings: ServerSettings) -> "TemporalEngine":
    """Raises DefinitionError where the extra is not installed."""
    try:
        from flock.temporal import TemporalEngine
    except ImportError as exc:
        raise DefinitionError(str(exc)) from exc
    return TemporalEngine(
        flock.agents,
        settings.temporal,
        flock=flock.name,
        limits=settings.limits,
        payload_dir=settings.payload_dir,
    )


def run_worker(flock: DeclaredFlock, settings: WorkerSettings) -> None:
    """Carry out runs of *flock* that servers have accepted on a Temporal cluster, until SIGINT or SIGTERM.

    It sets up logging, as only the program's owner should.

    Raises: StoreError, DefinitionError where the cluster cannot be used, or the extra is not installed.
    """
    logging.config.dictConfig(_log_config(settings.log_json))
    tune_gc()
    anyio.run(_work_until_told, flock, settings)
    abandon_busy_threads()
    _end_process()  # threads of temporalio's core call Python now and then, also while it is being torn down


async def _work_until_told(flock: DeclaredFlock, settings: WorkerSettings) -> None:
    try:
        from flock.temporal import TemporalWorker
    except ImportError as exc:
        raise DefinitionError(str(exc)) from exc
    worker = TemporalWorker(
        flock.agents,
        ModelClient(flock.model),
        settings.temporal,
        flock=flock.name,
        limits=settings.limits,
        max_steps=flock.max_steps,
        drain_timeout_s=settings.drain_timeout_s,
        expose_errors=settings.expose_errors,
        payload_dir=settings.payload_dir,
    )
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with worker:
            agents = ", ".join(flock.agents) or "no agents"
            logger.info("Working for %s: %s. Press CTRL+C to quit.", worker.cluster.address, agents)
            warn_of_problems(flock.agents, flock.model)
            async for _ in signals:
                logger.info("Stopping: turns at work have %g s to end.", settings.drain_timeout_s)
                break


def _config(app: FlockAPI, settings: ServerSettings) -> uvicorn.Config:
    root_path = settings.root_path.strip("/")
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=_log_config(settings.log_json),
        server_header=False,
        http=functools.partial(Connection, write_timeout_s=settings.write_timeout_s),  # type: ignore[arg-type]
        root_path=f"/{root_path}" if root_path else "",
        forwarded_allow_ips=settings.forwarded_allow_ips,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s + ANSWER_TIMEOUT_S),
    )


def _log_config(as_json: bool) -> dict[str, Any]:
    log_config: dict[str, Any] = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    log_config["formatters"]["default"]["()"] = _TextFormatter
    if as_json:
        log_config["formatters"] = {key: {"()": "flock.engine.logs.JSONFormatter"} for key in log_config["formatters"]}
    log_config["loggers"]["flock"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return log_config


async def _open_once(flock: DeclaredFlock, settings: ServerSettings) -> None:
    """Bring the store or the cluster into form, or say why it cannot be used, before anything listens."""
    if settings.temporal:
        await _temporal_engine(flock, settings).cluster.connect()
        return
    async with Store(settings.store, durability=settings.durability):
        pass


def _say_what_is_served(flock: DeclaredFlock, settings: ServerSettings) -> None:
    if settings.app.api_keys is None and not _is_private(settings):
        logger.warning("Listening on %s without a key: whoever reaches this port can run these agents.", settings.host)
    elif settings.app.api_keys is None:
        logger.info("Programs on this machine need no key. Set %s to demand one.", KEYS_VARIABLE)
    if not flock.agents:
        logger.warning("This flock has no agents yet: add one with flock.add_agent(...).")
    kept = "in memory only" if settings.store == MEMORY else f"in {Path(settings.store).resolve()}"
    kept = f"on the Temporal cluster at {settings.temporal}" if settings.temporal else kept
    agents = ", ".join(flock.agents) or "no agents"
    pages = "UI: /ui. Docs: /docs and /redoc" if settings.app.create_ui else "Docs: /docs and /redoc"
    logger.info("%s serves %s. %s. Runs are kept %s.", settings.app.server_name, agents, pages, kept)


def tune_gc() -> None:
    """Spare the garbage collector what is there for good, and let it look less often: a request leaves no cycles.

    For a process that is a server and nothing else. It takes a tenth off the time of a short run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _allow_open_files() -> None:
    """A connection takes one, and many shells allow no more than 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _serve(config: uvicorn.Config, settings: ServerSettings, sockets: list[socket.socket] | None = None) -> None:
    tune_gc()
    _allow_open_files()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the way to stop it, and no error
        _Server(config, settings.drain_timeout_s).run(sockets)
    abandon_busy_threads()
    if settings.temporal:
        _end_process()  # as in run_worker


class _TextFormatter(uvicorn.logging.DefaultFormatter):
    """uvicorn's, but a newline in what a client sent begins no line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if not message.isprintable():
            record = copy.copy(record)
            record.msg, record.args, record.exc_text = one_line(message), None, None
        return super().format(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"    {one_line(line)}" for line in super().formatException(ei).splitlines())


class _Server(uvicorn.Server):
    """uvicorn alone closes its listener first; this one goes on answering until the work has ended or is left."""

    def __init__(self, config: uvicorn.Config, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._drain_timeout_s = drain_timeout_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit as exc:
            if isinstance(exc.__context__, OSError):  # uvicorn has logged it, without a remedy
                _say_that_it_cannot_listen(self.config.host, self.config.port, exc.__context__)
            raise
        await self._accept_faster()
        # A forked child that outlives this process (a process pool's, say) must not keep its port.
        os.register_at_fork(after_in_child=self._close_listeners)

    async def _accept_faster(self) -> None:
        """Listen on copies of each socket: libuv accepts one connection from each of them in a turn of the loop.

        With one socket, a client that opens many connections would keep those of others waiting for seconds.
        """
        loop = asyncio.get_running_loop()
        make_protocol = functools.partial(
            self.config.http_protocol_class,  # as uvicorn calls it
            config=self.config,  # type: ignore[call-arg]
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        for listener in [listener for server in self.servers for listener in server.sockets]:
            for _ in range(ACCEPTED_IN_A_TURN - 1):
                copied = socket.socket(fileno=os.dup(listener.fileno()))
                self.servers.append(await loop.create_server(make_protocol, sock=copied, backlog=self.config.backlog))

    def _close_listeners(self) -> None:
        for listener in itertools.chain.from_iterable(server.sockets for server in self.servers):
            with contextlib.suppress(OSError):
                os.close(listener.fileno())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FlockAPI)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._hurry_on_request, app)
            await app.engine.drain(self._drain_timeout_s)
            tasks.cancel_scope.cancel()
        self.force_exit = False  # it would leave out the end of the lifespan, in which runs are left in order
        await super().shutdown(sockets)

    async def _hurry_on_request(self, app: FlockAPI) -> None:
        """A second Ctrl-C ends the patience, not the order."""
        while not self.force_exit:  # noqa: ASYNC110 - uvicorn has no event for it
            await anyio.sleep(0.1)
        await app.engine.drain(0)


def abandon_busy_threads(exit_code: int = 0) -> None:
    """Do not wait at exit for functions that do not return; their runs have ended, or are left for the next start."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("AnyIO worker")]
    for thread in threads:
        thread.join(THREAD_TIMEOUT_S)
    if any(thread.is_alive() for thread in threads):
        logger.warning("Leaving without functions that have not returned.")
        _end_process(exit_code)


def _end_process(exit_code: int = 0) -> NoReturn:
    """Without Python's own end, which threads that are not ours may not survive."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)

"""The server: uvicorn with a graceful shutdown, in one process, or in several that share a socket and a store."""

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
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn, cast

import anyio
import msgspec
import sniffio
import uvicorn
import uvicorn.config
import uvicorn.logging

from flock.agents.checks import warn_of_problems
from flock.command.accepting import ACCEPTS_PER_ITERATION, NOT_ACCEPTING, Acceptor
from flock.command.connection import Connection, ServerState
from flock.command.exporter import end_export, export_traces
from flock.declared import DeclaredFlock
from flock.errors import DefinitionError
from flock.limits import Limits
from flock.logs import AuditFile, auditor
from flock.models.llm import ModelClient
from flock.models.pace import share_limits_among
from flock.options import WEBHOOK_URL, Options, seconds, whole
from flock.runs import Engine, one_line
from flock.store.database import MEMORY, Durability
from flock.store.store import SQLiteStore
from flock.web.auth import ADMIN, KEYS_VARIABLE, SECRETS_VARIABLE, KeyRing, configured_keys, new_key
from flock.web.options import AppOptions
from flockapi import FlockAPI

if TYPE_CHECKING:
    from flock.temporal import TemporalEngine

logger = logging.getLogger("flock.server")

#: The names of this machine, which are allowed whenever ``Host`` is checked.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
#: How long the responses of interrupted runs may take, in seconds. Then uvicorn cuts them off.
RESPONSE_TIMEOUT_S = 5
#: The number of files and sockets that a server may have open, if the system allows it.
OPEN_FILES = 65_536
#: How long to wait at exit for an idle worker thread to end, in seconds.
THREAD_TIMEOUT_S = 1
#: How long accepted connections may still send a request that starts a run, before the drain, in seconds. Those that
#: do not are closed.
LAST_REQUESTS_S = 1.0
#: How long to wait then for the first requests of new connections, in seconds. A busy client may be slow to send it.
FIRST_REQUESTS_S = 3.0
#: The number of connections that wait to be accepted.
BACKLOG = 2048
#: The file descriptor of the first socket that systemd passes.
FIRST_PASSED_FD = 3
#: The delay before a dead worker is replaced, in seconds.
RESTART_DELAY_S = 1


class _Settings(Options, frozen=True, kw_only=True):
    """The settings that servers and workers share.

    Attributes:
        limits: the limits of the engine.
        payload_dir, files_dir: folders for values that are too long for the cluster, and for files; see
            ``TemporalEngine``.
        expose_errors: see ``EmbeddedEngine``.
        log_json: write the log as JSON, one object per line.
    """

    limits: Limits = Limits()
    payload_dir: str | None = None
    files_dir: str | None = None
    expose_errors: bool = False
    log_json: bool = False


class ServerSettings(_Settings, frozen=True, kw_only=True):
    """The settings of a server. The options of ``flockapi serve`` have the same names.

    Attributes:
        app: the options of ``create_app``, except those that the server sets: ``engine``, ``auth`` and
            ``allowed_hosts``.
        store, durability, expose_errors: see ``SQLiteStore`` and ``EmbeddedEngine``.
        temporal: ``host:port`` of a Temporal cluster that stores the runs instead. Its workers execute them.
        api_keys_file: more API keys, one ``name=key`` a line. It is read again at SIGHUP, and when a worker replaces
            a dead one.
        allow_anonymous: require no key, even if other machines can connect, and allow any ``Host``.
        allowed_hosts: additional values of ``Host``, which a proxy forwards. Others are rejected with 421. This and the
            next two settings mean that others can connect through a proxy, so requests need a key.
        root_path: the path prefix that a proxy removes from requests. Links begin with it.
        webhook_url: in place of that of the flock.
        forwarded_allow_ips: comma-separated addresses of proxies whose ``X-Forwarded-For`` and ``X-Forwarded-Proto``
            are trusted; ``*`` trusts all. None is uvicorn's default: the variable ``FORWARDED_ALLOW_IPS``, or
            127.0.0.1.
        access_log: also log a line for each request. Each run that ends has a line anyway.
        audit: a file for the events of ``flock.logs.audit``, as JSON, one object per line. All workers append to it.
    """

    TAKEN_BY: ClassVar[str] = "server"

    host: str = "127.0.0.1"
    port: int = 8344
    app: AppOptions = AppOptions()
    temporal: str | None = None
    store: str = "flock.db"
    durability: Durability = "power"
    #: How long runs may continue after the server is asked to stop. Then asynchronous runs are left for the next start,
    #: and the others end as interrupted.
    drain_timeout_s: Annotated[
        float, seconds("How long runs may continue after the server is asked to stop.", allow_zero=True)
    ] = 20
    api_keys_file: Path | None = None
    allow_anonymous: bool = False
    allowed_hosts: Sequence[str] = ()
    root_path: str = ""
    webhook_url: Annotated[str | None, WEBHOOK_URL] = None
    forwarded_allow_ips: str | None = None
    #: Max concurrent connections. New ones above the limit are rejected with 503. Admitted ones continue.
    max_connections: Annotated[
        int, whole(1, "Max concurrent connections, per process. New ones above the limit are rejected with 503.")
    ] = 20_000
    #: See ``Connection``.
    write_timeout_s: Annotated[
        float, seconds("A client that reads nothing of its response for this long is disconnected.")
    ] = 30
    access_log: bool = False
    audit: str | None = None


class WorkerSettings(_Settings, frozen=True, kw_only=True):
    """The settings of a worker. The options of ``flockapi worker`` have the same names. See ``TemporalWorker``."""

    TAKEN_BY: ClassVar[str] = "worker"

    temporal: str
    drain_timeout_s: Annotated[
        float,
        seconds(
            "How long steps may continue after the worker is asked to stop. Then other workers repeat them.",
            allow_zero=True,
        ),
    ] = 20


def serve_flock(flock: DeclaredFlock, settings: ServerSettings, listener: socket.socket | None = None) -> None:
    """Serve *flock* until SIGINT or SIGTERM. This configures logging for the whole process.

    Args:
        listener: see ``passed_listener``.

    Raises: StoreError if the store cannot be used.
    """
    _hold_sighup()
    try:
        settings = _with_access_control(_listening_on(listener, settings))
        config = _config(_app(flock, settings), settings)
        anyio.run(_prepare_storage, flock, settings)
    except BaseException:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        raise
    _log_start(flock, settings)
    export_traces(flock.name)
    if listener is not None:
        _log_listening(settings, listener)
    _serve(_Server(config, settings, is_passed=listener is not None), settings, listener)


def serve_workers(load: Callable[[], DeclaredFlock], workers: int, settings: ServerSettings) -> None:
    """Serve in *workers* processes until SIGINT or SIGTERM. If one dies, it is replaced, and others resume its runs.

    Args:
        load: returns the flock. It is called in each process, so it must be picklable.

    Raises: StoreError if the store cannot be used.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the cleanup below runs
    _hold_sighup()
    with _metrics_folder():
        sys.exit(_serve_workers(load, workers, settings))


@contextlib.contextmanager
def _metrics_folder() -> Iterator[None]:
    """Set the folder in which workers share their metrics. prometheus_client reads the variable when it is imported."""
    with tempfile.TemporaryDirectory(prefix="flockapi-metrics-") as folder:
        used_folder = os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        try:
            yield
        finally:
            if used_folder == folder:
                del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def _serve_workers(load: Callable[[], DeclaredFlock], workers: int, settings: ServerSettings) -> int:
    """Serve as in ``serve_workers``, and return the exit code."""
    passed = passed_listener()
    flock, settings = load(), _with_access_control(_listening_on(passed, settings))
    app = _app(flock, settings)
    _config(app, settings)  # which configures the log of this process too
    anyio.run(_prepare_storage, flock, settings)
    _log_start(flock, settings)
    app.warn_of_problems()
    listener = passed or _listen(settings)
    _log_listening(settings, listener)
    signals, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # Python writes the signal to the wakeup socket

    def read_keys() -> bool:
        nonlocal settings
        read = _with_keys_of_file(settings)
        settings = read or settings
        return read is not None

    # Without a lock, which a worker that is killed would keep.
    has_started = multiprocessing.get_context("spawn").RawValue("b", 0)
    connections = multiprocessing.get_context("spawn").RawArray("i", [NOT_ACCEPTING] * workers)
    numbers = dict[int | None, int]()  # of the workers, by the id of the process

    def start() -> SpawnProcess:
        read_keys()
        number = min({*range(workers)} - {*numbers.values()})
        process = _start_worker(load, settings, listener, passed is not None, has_started, connections, number)
        numbers[process.pid] = number
        return process

    def on_exit(pid: int | None) -> None:
        connections[numbers.pop(pid)] = NOT_ACCEPTING
        if app.metrics:
            app.metrics.mark_process_dead(pid)

    return _supervise(start, workers, signals, read_keys, lambda: bool(has_started.value), on_exit)


def _hold_sighup() -> None:
    """Let SIGHUP wait until this process has a handler for it, instead of ending the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def passed_listener() -> socket.socket | None:
    """Return the socket that systemd, or another parent, has passed (``sd_listen_fds(3)``), or None.

    Raises: DefinitionError if there are several.
    """
    names = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    pid, count, _ = (os.environ.pop(name, "") for name in names)  # they are not meant for children
    if pid != str(os.getpid()) or count in ("", "0"):
        return None
    if count != "1":
        raise DefinitionError(f"{count} sockets were passed to this server, and it takes one. Use one ListenStream=.")
    os.set_inheritable(FIRST_PASSED_FD, False)
    return socket.socket(fileno=FIRST_PASSED_FD)


def _listening_on(listener: socket.socket | None, settings: ServerSettings) -> ServerSettings:
    """Return *settings* with the address of a passed *listener*, which decides who can connect."""
    if listener is None:
        return settings
    address = listener.getsockname()
    host, port = address[:2] if isinstance(address, tuple) else (address, settings.port)
    return msgspec.structs.replace(settings, host=host, port=port)


def _listen(settings: ServerSettings) -> socket.socket:
    """Listen before the workers start, so that early connections wait instead of failing.

    uvicorn would log that it is running before it listens.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as exc:
        _log_listen_error(settings.host, settings.port, exc)
        sys.exit(1)
    return listener


def _log_listening(settings: ServerSettings, listener: socket.socket) -> None:
    if listener.family == socket.AF_UNIX:
        logger.info("Running on the Unix socket %s", settings.host)
        return
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logger.info("Running on http://%s:%d (Press CTRL+C to quit)", host, listener.getsockname()[1])


def _log_listen_error(host: str, port: int, exc: OSError) -> None:
    reason = os.strerror(exc.errno) if exc.errno and exc.errno > 0 else exc.strerror  # resolver errors are negative
    remedy = "Choose another port with --port, or another address with --host (port= and host= of start_api)."
    logger.error("Cannot listen on %s, port %d: %s. %s", host, port, reason, remedy)


def _supervise(
    start: Callable[[], SpawnProcess],
    workers: int,
    signals: socket.socket,
    on_sighup: Callable[[], bool],
    has_started: Callable[[], bool],
    on_exit: Callable[[int | None], None],
) -> int:
    """Replace workers that die, until a stop is requested, or a worker cannot start. Return the exit code.

    After one has started, the reason why another one cannot start may pass: it is replaced too.

    Args:
        signals: receives the number of each signal.
        on_sighup: called before SIGHUP is passed on to the workers. If it returns False, it is not passed on.
        has_started: whether any worker has ever started.
        on_exit: called with the id of each process that has ended.
    """
    processes = [start() for _ in range(workers)]
    exit_code, is_stopping = 0, False
    while not exit_code and not is_stopping:
        ready = multiprocessing.connection.wait([signals, *(process.sentinel for process in processes)])
        if signals in ready:
            is_stopping = _is_stop(signals, processes, on_sighup)
        for process in [process for process in processes if process.sentinel in ready]:
            process.join()
            processes.remove(process)
            on_exit(process.pid)
            if process.exitcode == uvicorn.config.STARTUP_FAILURE and not has_started():
                exit_code = uvicorn.config.STARTUP_FAILURE
                continue
            if not is_stopping and multiprocessing.connection.wait([signals], RESTART_DELAY_S):
                is_stopping = _is_stop(signals, processes, on_sighup)
            if not is_stopping:
                logger.warning(
                    "Worker %s exited (exit code %s). A new worker replaces it.", process.pid, process.exitcode
                )
                processes.append(start())
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
    return exit_code


def _is_stop(signals: socket.socket, processes: Sequence[SpawnProcess], on_sighup: Callable[[], bool]) -> bool:
    """Read *signals*, pass SIGHUP on, and return whether there is another one."""
    numbers = set(signals.recv(1024))
    if signal.SIGHUP in numbers and on_sighup():
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGHUP)
    return bool(numbers - {signal.SIGHUP})


def _start_worker(*args: Any) -> SpawnProcess:
    """Call ``_worker_main`` in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=_worker_main, args=args)
    _hold_sighup()  # in the new process, which inherits this
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    return process


def _worker_main(
    load: Callable[[], DeclaredFlock],
    settings: ServerSettings,
    listener: socket.socket,
    is_passed: bool,
    has_started: Any,
    connections: MutableSequence[int],
    number: int,
) -> None:
    """Serve in one of several processes. They share the value *has_started*, and *connections*; see ``Acceptor``."""
    share_limits_among(len(connections))
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        flock = load()
        config = _config(_app(flock, settings), settings)
        export_traces(flock.name)
        logging.getLogger("flock.checks").disabled = True  # the parent process has logged the problems
    except Exception:
        traceback.print_exc()
        sys.exit(uvicorn.config.STARTUP_FAILURE)
    server = _Server(
        config,
        settings,
        is_passed=is_passed,
        on_start=lambda: setattr(has_started, "value", 1),
        accepting=functools.partial(Acceptor, counts=connections, number=number),
    )
    _serve(server, settings, listener)


def _stop_with_parent() -> None:
    """Stop this worker if its parent dies. Otherwise it would run until it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _with_access_control(settings: ServerSettings) -> ServerSettings:
    """Return *settings* with the configured keys. If there are none and others can connect, generate and print one."""
    if settings.app.api_keys is None:
        settings = _with_keys(settings, configured_keys(settings.api_keys_file))
    if settings.app.api_keys is not None or settings.allow_anonymous or _is_private(settings):
        return settings
    key = new_key()
    print(
        "Other machines can reach this server, and no API key is configured. Every request needs this key, which "
        "was generated for this start:\n\n"
        f"    Authorization: Bearer {key}\n\n"
        f"Set your own with {KEYS_VARIABLE}='me=...' ('flockapi key' prints a new one), or require no key with "
        "--allow-anonymous.\n",
        file=sys.stderr,
        flush=True,
    )
    return _with_keys(settings, {f"owner{ADMIN}": key})


def _with_keys(settings: ServerSettings, api_keys: Mapping[str, str] | None) -> ServerSettings:
    return msgspec.structs.replace(settings, app=msgspec.structs.replace(settings.app, api_keys=api_keys))


def _with_keys_of_file(settings: ServerSettings) -> ServerSettings | None:
    """Return *settings* with the keys that the file has now. If it is invalid, log an ERROR and return None."""
    if settings.api_keys_file is None:
        return settings
    try:
        keys = configured_keys(settings.api_keys_file)
        KeyRing(keys or {})
    except DefinitionError as exc:
        logger.error("The API keys were not read again, and the former ones remain valid. %s", exc)
        return None
    return _with_keys(settings, keys)


def _allowed_hosts(settings: ServerSettings) -> Collection[str] | None:
    """Return the allowed values of ``Host``. Without keys it is restricted, as a protection against DNS rebinding."""
    is_open = settings.app.api_keys is None and not settings.allow_anonymous
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return {*LOOPBACK, host, *settings.allowed_hosts} if is_open or settings.allowed_hosts else None


def _is_private(settings: ServerSettings) -> bool:
    """Whether only programs on this machine can send requests: the address is loopback, and there is no proxy."""
    is_proxied = settings.allowed_hosts or settings.root_path or settings.forwarded_allow_ips or settings.app.public_url
    return _is_loopback(settings.host) and not is_proxied


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _app(flock: DeclaredFlock, settings: ServerSettings) -> FlockAPI:
    flock.webhook_url = settings.webhook_url or flock.webhook_url
    engine = _temporal_engine(flock, settings) if settings.temporal else _embedded_engine(flock, settings)
    options = msgspec.structs.replace(
        settings.app,
        engine=engine,
        auth="anybody" if settings.app.api_keys is None else None,  # _log_start has a warning of its own
        allowed_hosts=_allowed_hosts(settings),
        webhook_secrets=settings.app.webhook_secrets or re.findall(r"[^,\s]+", os.environ.get(SECRETS_VARIABLE, "")),
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
    """Return the engine on the cluster. Raises DefinitionError if the extra is not installed."""
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
        files_dir=settings.files_dir,
        prices=flock.prices,
        default_model=flock.model,
    )


def run_worker(flock: DeclaredFlock, settings: WorkerSettings) -> None:
    """Execute runs of *flock* that servers have accepted on a Temporal cluster, until SIGINT or SIGTERM.

    This configures logging for the whole process.

    Raises: StoreError if the cluster cannot be used; DefinitionError if the extra is not installed.
    """
    logging.config.dictConfig(log_config(settings.log_json))
    export_traces(flock.name)
    tune_gc()
    anyio.run(_run_until_signal, flock, settings)
    end_export()
    abandon_busy_threads()
    _exit_now()  # threads of temporalio's core may call Python during its shutdown, and crash it


async def _run_until_signal(flock: DeclaredFlock, settings: WorkerSettings) -> None:
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
        files_dir=settings.files_dir,
        prices=flock.prices,
        shared=flock.shared,
    )
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with worker:
            agents = ", ".join(flock.agents) or "no agents"
            logger.info("Worker connected to %s. Agents: %s. Press CTRL+C to quit.", worker.cluster.address, agents)
            warn_of_problems(flock.agents, flock.model)
            async for _ in signals:
                logger.info("Stopping. Running steps have %g s to finish.", settings.drain_timeout_s)
                break


def _config(app: FlockAPI, settings: ServerSettings) -> uvicorn.Config:
    root_path = settings.root_path.strip("/")
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=log_config(settings.log_json, settings.audit),
        access_log=settings.access_log,
        server_header=False,
        http=functools.partial(Connection, write_timeout_s=settings.write_timeout_s),  # type: ignore[arg-type]
        root_path=f"/{root_path}" if root_path else "",
        forwarded_allow_ips=settings.forwarded_allow_ips,
        limit_concurrency=settings.max_connections,
        backlog=ACCEPTS_PER_ITERATION,  # asyncio's loop accepts as many in one callback, before it does anything else
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s + RESPONSE_TIMEOUT_S),
    )


def log_config(as_json: bool, audit: str | None = None) -> dict[str, Any]:
    """Return the configuration of the log of a command, which goes to stderr, and of the file *audit*.

    Raises: DefinitionError if that cannot be written.
    """
    config: dict[str, Any] = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["formatters"]["default"]["()"] = _TextFormatter
    for handler in config["handlers"].values():
        handler["class"] = "flock.logs.LineHandler"
    if as_json:
        config["formatters"] = {key: {"()": "flock.logs.JSONFormatter"} for key in config["formatters"]}
    config["loggers"]["flock"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    if audit is not None:
        AuditFile(audit).close()  # the error of logging would not name the reason
        config["formatters"]["audit"] = {"()": "flock.logs.JSONFormatter"}
        config["handlers"]["audit"] = {"class": "flock.logs.AuditFile", "formatter": "audit", "filename": audit}
        config["loggers"]["flock.audit"] = {"handlers": ["audit"]}
    config["loggers"]["opentelemetry"] = {"handlers": ["default"], "level": "WARNING", "propagate": False}
    return config


async def _prepare_storage(flock: DeclaredFlock, settings: ServerSettings) -> None:
    """Create or migrate the store, or connect to the cluster. This raises errors before the server listens."""
    if settings.temporal:
        await _temporal_engine(flock, settings).cluster.connect()
        return
    async with SQLiteStore(settings.store, durability=settings.durability):
        pass


def _log_start(flock: DeclaredFlock, settings: ServerSettings) -> None:
    if settings.app.api_keys is None and not _is_private(settings):
        logger.warning(
            "Listening on %s without API keys. Every client that can reach this port can run these agents.",
            settings.host,
        )
    elif settings.app.api_keys is None:
        logger.info("Programs on this machine need no API key. Set %s to require one.", KEYS_VARIABLE)
    storage = "in memory only" if settings.store == MEMORY else f"in {Path(settings.store).resolve()}"
    storage = f"on the Temporal cluster at {settings.temporal}" if settings.temporal else storage
    agents = ", ".join(flock.agents) or "no agents"
    pages = "UI: /ui. Docs: /docs and /redoc" if settings.app.create_ui else "Docs: /docs and /redoc"
    logger.info("%s serves %s. %s. Runs are stored %s.", settings.app.server_name, agents, pages, storage)


def tune_gc() -> None:
    """Exclude existing objects from garbage collection, and collect few objects at a time and all of them rarely.

    A collection visits the new objects of the requests that are open, and holds the event loop: for about 7 ms if they
    are 4,000. So the young ones are collected after 2,000, more than most loads have open. With a threshold of 0, each
    second collection also has those of the one before. What ends leaves few cycles, so all objects are collected
    rarely, and while no run is active. Only for a process that is nothing but a server. It makes short runs a tenth
    faster.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 0, 15_000)


def _allow_open_files() -> None:
    """Raise the limit of open files. Each connection needs one, and many shells allow only 1,024."""
    import resource  # not on Windows: the import of the store says so first

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def _serve(server: "_Server", settings: ServerSettings, listener: socket.socket | None) -> None:
    tune_gc()
    _allow_open_files()
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the normal way to stop the server
        server.run(None if listener is None else [listener])
    abandon_busy_threads()
    if settings.temporal:
        _exit_now()  # as in run_worker


class _TextFormatter(uvicorn.logging.DefaultFormatter):
    """uvicorn's formatter, but newlines in client data are escaped, so that they cannot forge lines of the log."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not record.message.isprintable():
            record.message, record.exc_text = one_line(record.message), None
        if self.use_colors:
            return super().formatMessage(record)
        return f"{record.levelname + ':':9} {record.message}"  # the same text, without a copy of the record

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"    {one_line(line)}" for line in super().formatException(ei).splitlines())


class _Server(uvicorn.Server):
    """uvicorn's server, but it still responds while it drains. uvicorn would close its listener first.

    Args:
        is_passed: the listener outlives this server. So connections that arrive while it drains are not accepted:
            they wait for the next server.
        on_start: called when the server has started.
        accepting: makes what accepts the connections of a worker; None if it is the only one.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        settings: ServerSettings,
        *,
        is_passed: bool,
        on_start: Callable[[], None] = lambda: None,
        accepting: Callable[..., Acceptor] | None = None,
    ) -> None:
        super().__init__(config)
        self.server_state: ServerState = ServerState()
        self._settings = settings
        self._is_passed, self._on_start = is_passed, on_start
        self._accepting, self._acceptors = accepting, list[Acceptor]()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        sniffio.thread_local.name = "asyncio"  # anyio asks in each of its calls, and would look for the current task
        try:
            await super().serve(sockets)
        finally:
            sniffio.thread_local.name = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Write the last lines of the log before uvicorn raises a signal again, which ends the process."""
        with super().capture_signals():
            try:
                yield
            finally:
                end_export()
                for name in ("uvicorn", "uvicorn.access", "flock"):
                    for handler in logging.getLogger(name).handlers:
                        handler.flush()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets if self._accepting is None else [])
        except SystemExit as exc:
            if isinstance(exc.__context__, OSError):  # uvicorn has logged it, but without a remedy
                _log_listen_error(self.config.host, self.config.port, exc.__context__)
            raise
        if self.started:
            self._on_start()
        if self._accepting is None:
            await self._accept_faster()
        else:
            connections: Collection[object] = self.server_state.connections
            self._acceptors = [self._accepting(each, self._make_protocol, connections) for each in sockets or ()]
            self.servers += cast(list[asyncio.Server], self._acceptors)
        # A forked child that outlives this process, such as a process pool's, must not hold the port.
        os.register_at_fork(after_in_child=self._close_listeners)
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._read_keys)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def _read_keys(self) -> None:
        app = self.config.app
        assert isinstance(app, FlockAPI)
        if self._settings.api_keys_file is None or app.keys is None:
            logger.info("SIGHUP has no effect without --api-keys-file.")
        elif (read := _with_keys_of_file(self._settings)) is not None and read.app.api_keys is not None:
            app.keys.replace(read.app.api_keys)
            names = list(read.app.api_keys)
            extra = {"event": "keys.changed", "key_names": names}
            auditor.info("The API keys were read again: %s.", ", ".join(names), extra=extra)

    async def _accept_faster(self) -> None:
        """Listen on copies of each socket, since libuv accepts one connection per socket and iteration of the loop.

        With one socket, a client that opens many connections would delay those of others for seconds. At last, let
        more connections wait than are accepted at once.
        """
        loop = asyncio.get_running_loop()
        for listener in [listener for server in self.servers for listener in server.sockets]:
            for _ in range(ACCEPTS_PER_ITERATION - 1):
                copy_ = socket.socket(fileno=os.dup(listener.fileno()))
                self.servers.append(
                    await loop.create_server(self._make_protocol, sock=copy_, backlog=self.config.backlog)
                )
            with socket.socket(fileno=os.dup(listener.fileno())) as copy_:
                copy_.listen(BACKLOG)

    def _make_protocol(self) -> asyncio.Protocol:
        """Make that of a connection, as uvicorn does."""
        config, state = self.config, self.server_state
        protocol_class: Any = config.http_protocol_class
        protocol: asyncio.Protocol = protocol_class(config=config, server_state=state, app_state=self.lifespan.state)
        return protocol

    async def on_tick(self, counter: int) -> bool:
        for acceptor in self._acceptors:
            acceptor.note()
        return await super().on_tick(counter)

    def _close_listeners(self) -> None:
        for listener in itertools.chain.from_iterable(server.sockets for server in self.servers):
            with contextlib.suppress(OSError):
                os.close(listener.fileno())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FlockAPI)
        self.server_state.is_stopping = True
        for connection in self._connections():
            connection.finish()
        if self._is_passed:
            for server in self.servers:
                server.close()
            await anyio.sleep(LAST_REQUESTS_S)
            with anyio.move_on_after(FIRST_REQUESTS_S):
                while any(each.cycle is None for each in self._connections()):  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            for connection in self._connections():
                if connection.is_idle:
                    connection.shutdown()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._end_drain_on_second_signal, app)
            await app.engine.drain(self._settings.drain_timeout_s)
            tasks.cancel_scope.cancel()
        self.force_exit = False  # it would skip the end of the lifespan, in which the engine closes
        await super().shutdown(sockets)

    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]

    async def _end_drain_on_second_signal(self, app: FlockAPI) -> None:
        """End the drain at a second Ctrl-C. The rest of the shutdown stays graceful."""
        while not self.force_exit:  # noqa: ASYNC110 - uvicorn has no event for it
            await anyio.sleep(0.1)
        await app.engine.drain(0)


def abandon_busy_threads(exit_code: int = 0) -> None:
    """Exit at once if functions are still running in threads. Their runs have ended, or are left for the next start."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("AnyIO worker")]
    for thread in threads:
        thread.join(THREAD_TIMEOUT_S)
    if any(thread.is_alive() for thread in threads):
        logger.warning("Exiting although some functions have not returned.")
        _exit_now(exit_code)


def _exit_now(exit_code: int = 0) -> NoReturn:
    """End the process without Python's finalization, which would wait for threads, or crash foreign ones."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(exit_code)

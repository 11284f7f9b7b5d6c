"""A batch from a file to a file, which goes on where it stopped when it is asked for again.

What is done is kept in the batch's *state*: a store that holds this batch and nothing else, beside the output, and that
is removed once the output is there. A mark in the file tells it from all other databases, which are left alone.
"""

import contextlib
import errno
import glob
import gzip
import hashlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, cast

import msgspec

from flock.agents.workflow import columns_of, result_names
from flock.declared import DeclaredFlock
from flock.engine.batchstore import BatchStore
from flock.engine.embedded import limits_for_one_batch
from flock.engine.files import create_private, exclusive_lock
from flock.engine.progress import follow_batch
from flock.engine.rowchecks import BatchCheck, check_batch
from flock.engine.statements import COUNT_TABLES
from flock.engine.store import Store
from flock.errors import AgentNotFound, StoreError
from flock.rows.dialect import CSVDialect
from flock.rows.results import item_pages, results_as
from flock.rows.tables import RowMapping, TableFormat, file_rows, is_gzipped
from flock.runs import Batch, BatchFilter, BatchOptions, Engine, OnExtra, OnInvalid

__all__ = ["BatchFile", "check_batch_file", "run_batch_file"]

#: ``PRAGMA application_id`` of a state: "Floc" in ASCII.
MARK = 0x466C6F63


class BatchFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for.

    Attributes:
        output: where the results go; None is *stdout*.
        format: of the output.
        force: replace an output that exists.
        state: where what is done is kept.
        escape_formulas: see ``CSVWriter``.
        on_extra, input_mapping, static_inputs and others: see ``Flock.run_batch_async``.
    """

    agent_name: str
    rows: Path
    output: Path | None
    format: TableFormat
    state: Path
    options: BatchOptions
    force: bool = False
    on_invalid: OnInvalid = "reject"
    input_mapping: Mapping[str, str | None] = {}
    static_inputs: Mapping[str, msgspec.Raw] = {}
    on_extra: OnExtra = "reject"
    dialect: CSVDialect = CSVDialect()
    escape_formulas: bool = True


async def run_batch_file(
    flock: DeclaredFlock, wanted: BatchFile, stdout: IO[bytes], say: Callable[[str], None]
) -> Batch:
    """Run a batch to its end, and write its results in the order of the rows.

    What an earlier call with the same rows and options has committed is not run again. One with others is dropped.

    Args:
        say: is told, in words, what an earlier call left.

    Raises:
        BlockingIOError: another process is at work on this state.
        AgentNotFound, InvalidData, TooLarge, DefinitionError: nothing is begun; see ``Flock.run_batch_async``.
        StoreError: the state cannot be used, or is a file of something else.
        OSError: a file cannot be read or written, or the output exists already. The state is kept, for the next call.

    Cancellation: what is done is kept, for the next call.
    """
    if wanted.agent_name not in flock.agents:
        raise AgentNotFound(wanted.agent_name, list(flock.agents))
    state = _real(wanted.state)
    digest = _digest(flock, wanted)
    with exclusive_lock(f"{state}-batch"):
        _check_free(wanted, state, digest)
        batch = await _left_before(flock, state, digest, wanted.options, say)
        try:
            async with flock.engine(
                store=state, limits=limits_for_one_batch(wanted.options.max_workers), expose_errors=True
            ) as engine:
                batch = batch or await _accept(engine, flock, wanted, digest)
                batch = await follow_batch(engine, batch.batch_id)
                pieces = results_as(
                    wanted.format,
                    item_pages(engine, batch.batch_id),
                    batch.extra_names,
                    columns_of(wanted.agent_name, flock.agents),
                    wanted.escape_formulas,
                )
                with _output(wanted, state, digest) if wanted.output else contextlib.nullcontext(stdout) as file:
                    async for piece in pieces:
                        file.write(piece)
                    file.flush()
        except Exception:
            if batch is None:  # nothing is kept in it
                _remove_state(state)
            raise
        _remove_state(state)
    return batch


async def check_batch_file(flock: DeclaredFlock, wanted: BatchFile) -> BatchCheck:
    """Read and check all rows as ``run_batch_file`` would. Nothing is run or written, and no state is looked at.

    Raises: AgentNotFound, TooLarge, OSError; InvalidData if neither a row nor a header can be read.
    """
    if wanted.agent_name not in flock.agents:
        raise AgentNotFound(wanted.agent_name, list(flock.agents))
    engine, agent, row_mapping = (
        flock.engine(limits=limits_for_one_batch(1)),
        flock.agents[wanted.agent_name],
        _row_mapping(flock, wanted),
    )
    async with contextlib.aclosing(file_rows(wanted.rows, row_mapping, wanted.dialect)) as rows:
        return await check_batch(engine, agent, rows, row_mapping, wanted.on_invalid)


def _row_mapping(flock: DeclaredFlock, wanted: BatchFile) -> RowMapping:
    return RowMapping(
        flock.agents[wanted.agent_name].input,
        wanted.static_inputs,
        wanted.input_mapping,
        lambda: sys.maxsize,
        on_extra=wanted.on_extra,
        result_names=result_names(wanted.agent_name, flock.agents),
    )


async def _accept(engine: Engine, flock: DeclaredFlock, wanted: BatchFile, digest: str) -> Batch:
    async with contextlib.aclosing(file_rows(wanted.rows, _row_mapping(flock, wanted), wanted.dialect)) as rows:
        return await engine.submit_batch(
            wanted.agent_name, rows, wanted.options, on_invalid=wanted.on_invalid, request_id=digest
        )


def _digest(flock: DeclaredFlock, wanted: BatchFile) -> str:
    """What makes two calls the same. How many workers there are, and where the results go, may change in between.

    It is kept as the batch's request id, and not as an idempotency key, since those are forgotten after a day.
    """
    with _naming(wanted.rows), open(wanted.rows, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    options = (flock.name, flock.model, wanted.agent_name, wanted.on_invalid, wanted.dialect.delimiter)
    fills = (sorted(wanted.input_mapping.items()), sorted(wanted.static_inputs.items()), wanted.options.timeout_s)
    digest.update(msgspec.json.encode((options, fills)))
    newer = (wanted.on_extra, wanted.dialect.decimal, wanted.dialect.encoding)
    if newer != ("reject", ".", "utf-8"):  # a state of an older version is resumed
        digest.update(msgspec.json.encode(newer))
    return digest.hexdigest()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Where a file fails that is open already, Python does not say which."""
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc


# The state


def _real(path: Path) -> str:
    """Under whatever name it is called: locks go by it, and a link stays one."""
    return os.path.realpath(path)


async def _left_before(
    flock: DeclaredFlock, state: str, digest: str, options: BatchOptions, say: Callable[[str], None]
) -> Batch | None:
    """The batch of an earlier call that is to go on. What is left of another one is dropped, before it can go on."""
    _mark(state)
    async with Store(state) as store:
        batches = BatchStore(store)
        found = next(iter(batches.page(flock.name, BatchFilter(limit=1))), None)
        if found is not None and found.request_id == digest:
            say(f"Going on: {found.completed_items:,} of {found.total_items:,} rows were done before.")
            await batches.set_options(found.batch_id, options)
            return found
    if found is not None:
        say(
            "The rows or the options are not those of before. That batch is dropped, of whose "
            f"{found.total_items:,} rows {found.completed_items:,} were done, and a new one begins."
        )
    _remove_state(state)
    _mark(state)
    return None


def _mark(state: str) -> None:
    """Make a file that is a state. Raises StoreError where there is one that is none."""
    try:
        create_private(state)
        with contextlib.closing(sqlite3.connect(state)) as db:
            mark = db.execute("PRAGMA application_id").fetchone()[0]
            if mark == 0 and not db.execute(COUNT_TABLES).fetchone()[0]:
                db.execute(f"PRAGMA application_id = {MARK}")
                mark = MARK
    except (sqlite3.DatabaseError, OSError) as exc:
        raise StoreError(f"{state} cannot keep the state of a batch: {exc}. Name another file with --store.") from exc
    if mark != MARK:
        raise StoreError(f"{state} keeps something else than the state of a batch. Name another file with --store.")


def _remove_state(state: str) -> None:
    """And all that lies beside it, which comes first: a new file must not meet with the journal of the old one."""
    engines = glob.glob(f"{glob.escape(state)}-engine-*")
    for path in (f"{state}-wal", f"{state}-shm", f"{state}-lock", f"{state}-output", *engines, state):
        Path(path).unlink(missing_ok=True)


# The output


@contextlib.contextmanager
def _output(wanted: BatchFile, state: str, digest: str) -> Iterator[IO[bytes]]:
    """What is written becomes the output as a whole, or not at all; packed where its name says so."""
    assert wanted.output is not None
    path = Path(_real(wanted.output))
    # Whoever has the state is alone with it, and finds what was left behind.
    part = path.with_name(f"{path.name}.{hashlib.sha256(state.encode()).hexdigest()[:8]}.part")
    part.unlink(missing_ok=True)
    try:
        with _naming(wanted.output):
            with open(part, "xb") as raw:
                if is_gzipped(path):
                    with gzip.GzipFile(path.stem, "wb", fileobj=raw) as packed:
                        yield cast(IO[bytes], packed)
                else:
                    yield raw
                raw.flush()
                os.fsync(raw.fileno())  # before the state goes
            _check_free(wanted, state, digest)
            Path(f"{state}-output").write_text(_identity(part, digest))
            os.replace(part, path)
            _sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _check_free(wanted: BatchFile, state: str, digest: str) -> None:
    """Raise FileExistsError if the output exists, unless a call for this batch wrote it and died before its end."""
    if wanted.output is None or wanted.force or not wanted.output.is_file():
        return
    with contextlib.suppress(FileNotFoundError):
        if Path(f"{state}-output").read_text() == _identity(wanted.output, digest):
            return
    reason = "It exists already. Name another output, or add --force to replace it"
    raise FileExistsError(errno.EEXIST, reason, str(wanted.output))


def _identity(path: Path, digest: str) -> str:
    """Of a file that a batch has written: a rename keeps it; to write to the file, or to replace it, does not."""
    found = os.stat(path)
    return f"{digest} {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

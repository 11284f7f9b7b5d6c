"""A batch from a file to a file, which resumes if the same call is repeated.

Finished rows are stored in the *state* of the batch: an SQLite store beside the output that holds only this batch. It
is removed when the output has been written.
"""

import contextlib
import errno
import gzip
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, cast

import msgspec

from flock.agents.handoff import columns_of
from flock.agents.questions import nobody
from flock.declared import DeclaredFlock, agent_of
from flock.engine.rowchecks import BatchCheck, check_batch
from flock.limits import limits_for_one_batch
from flock.models.models import models_of, names_of
from flock.rows.dialect import CSVDialect
from flock.rows.results import item_pages, results_as
from flock.rows.tables import TableFormat, file_rows, is_gzipped
from flock.runs import Batch, BatchFilter, BatchOptions, Engine, OnExtra, OnInvalid, RunStatus
from flock.steps.progress import follow_batch
from flock.store.batchstate import create_state, remove_state
from flock.store.files import exclusive_lock, sync_folder
from flock.store.store import SQLiteStore


class BatchFile(msgspec.Struct, frozen=True, kw_only=True):
    """The files and options of a batch.

    Attributes:
        output: the file for the results; None is *stdout*.
        format: the format of the output.
        force: replace an output that exists.
        state: the file that stores finished rows.
        escape_formulas, with_usage: see ``CSVWriter``.
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
    with_usage: bool = False


async def run_batch_file(
    flock: DeclaredFlock, job: BatchFile, stdout: IO[bytes], report: Callable[[str], None]
) -> Batch:
    """Run a batch to its end, and write its results in the order of the rows.

    If it stops at its ``max_cost``, nothing is written, and the next call continues with its own ``max_cost``.

    Rows that an earlier call with the same rows and options has committed are not run again. The state of a call with
    other rows or options is dropped.

    Args:
        report: receives a message if an earlier call left a state.

    Raises:
        BlockingIOError: another process is using this state.
        AgentNotFound, InvalidData, TooLarge, DefinitionError: nothing was started; see ``Flock.run_batch_async``.
        StoreError: the state cannot be used, or the file is not a state.
        OSError: a file cannot be read or written, or the output already exists. The state is kept for the next call.

    Cancellation: finished rows are kept for the next call.
    """
    agent_of(flock.agents, job.agent_name)
    state = _real_path(job.state)
    digest = _digest(flock, job)
    with exclusive_lock(f"{state}-batch"):
        _check_output_free(job, state, digest)
        batch = await _resumable_batch(flock, state, digest, job.options, report)
        try:
            limits = limits_for_one_batch(job.options.max_workers)
            async with flock.engine(store=state, limits=limits, expose_errors=True, answer=nobody) as engine:
                if batch is not None and batch.error_type is not None:
                    await engine.retry_batch(batch.batch_id, [RunStatus.CANCELLED], job.options.max_cost)
                batch = batch or await _accept(engine, flock, job, digest)
                batch = await follow_batch(engine, batch.batch_id)
                if batch.error_type is not None:
                    return batch
                pieces = results_as(
                    job.format,
                    item_pages(engine, batch.batch_id),
                    batch.extra_names,
                    columns_of(job.agent_name, flock.agents),
                    job.escape_formulas,
                    with_usage=job.with_usage,
                )
                with _output(job, state, digest) if job.output else contextlib.nullcontext(stdout) as file:
                    async for piece in pieces:
                        file.write(piece)
                    file.flush()
        except Exception:
            if batch is None:  # the state is empty
                remove_state(state)
            raise
        remove_state(state)
    return batch


async def check_batch_file(flock: DeclaredFlock, job: BatchFile) -> BatchCheck:
    """Read and check all rows as ``run_batch_file`` would. Nothing is run or written, and the state is not read.

    Raises: AgentNotFound, TooLarge, OSError; InvalidData if neither a row nor a header can be read.
    """
    row_mapping = flock.row_mapping(job.agent_name, job.static_inputs, job.input_mapping, job.on_extra)
    engine, agent = flock.engine(limits=limits_for_one_batch(1)), flock.agents[job.agent_name]
    async with contextlib.aclosing(file_rows(job.rows, row_mapping, job.dialect)) as rows:
        return await check_batch(engine, agent, rows, row_mapping, job.on_invalid)


async def _accept(engine: Engine, flock: DeclaredFlock, job: BatchFile, digest: str) -> Batch:
    row_mapping = flock.row_mapping(job.agent_name, job.static_inputs, job.input_mapping, job.on_extra)
    async with contextlib.aclosing(file_rows(job.rows, row_mapping, job.dialect)) as rows:
        return await engine.submit_batch(
            job.agent_name, rows, job.options, on_invalid=job.on_invalid, request_id=digest
        )


def _digest(flock: DeclaredFlock, job: BatchFile) -> str:
    """Return a hash that is equal for calls that resume each other. It ignores the output and ``max_workers``.

    It is stored as the batch's request id, since idempotency keys are deleted after a day.
    """
    with _with_filename(job.rows), open(job.rows, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    models = names_of(models_of(flock.model, "the flock"))
    options = (flock.name, models, job.agent_name, job.on_invalid, job.on_extra, job.dialect, job.options.timeout_s)
    fills = (sorted(job.input_mapping.items()), sorted(job.static_inputs.items()))
    digest.update(msgspec.json.encode((options, fills)))
    return digest.hexdigest()


@contextlib.contextmanager
def _with_filename(path: Path) -> Iterator[None]:
    """Add the name of the file to an OSError. Python omits it if the file is already open."""
    try:
        yield
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc


# The state


def _real_path(path: Path) -> str:
    """Resolve links, so that every name of a file has the same lock, and a link is not replaced by a file."""
    return os.path.realpath(path)


async def _resumable_batch(
    flock: DeclaredFlock, state: str, digest: str, options: BatchOptions, report: Callable[[str], None]
) -> Batch | None:
    """Return the batch of an earlier call to resume, or None. Drop the state of a different batch."""
    create_state(state)
    async with SQLiteStore(state) as store:
        batches = store.batches
        stored = next(iter(await batches.page(flock.name, BatchFilter(limit=1))), None)
        if stored is not None and stored.request_id == digest:
            report(f"Resuming: {stored.completed_items:,} of {stored.total_items:,} rows are already done.")
            await batches.set_options(stored.batch_id, options)
            return stored
    if stored is not None:
        report(
            "The rows or the options have changed, so a new batch starts. The earlier batch is dropped "
            f"({stored.completed_items:,} of {stored.total_items:,} rows were done)."
        )
    remove_state(state)
    create_state(state)
    return None


# The output


@contextlib.contextmanager
def _output(job: BatchFile, state: str, digest: str) -> Iterator[IO[bytes]]:
    """Yield a file that atomically replaces the output at the end. It is gzip if the output's name says so."""
    assert job.output is not None
    path = Path(_real_path(job.output))
    # The name depends on the state, whose lock we hold. So no other process uses it, and we find what a crash left.
    part = path.with_name(f"{path.name}.{hashlib.sha256(state.encode()).hexdigest()[:8]}.part")
    part.unlink(missing_ok=True)
    try:
        with _with_filename(job.output):
            with open(part, "xb") as raw:
                if is_gzipped(path):
                    with gzip.GzipFile(path.stem, "wb", fileobj=raw) as packed:
                        yield cast(IO[bytes], packed)
                else:
                    yield raw
                raw.flush()
                os.fsync(raw.fileno())  # before the state is removed
            _check_output_free(job, state, digest)
            Path(f"{state}-output").write_text(_identity(part, digest))
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _check_output_free(job: BatchFile, state: str, digest: str) -> None:
    """Raise FileExistsError if the output exists, unless a call for this batch wrote it and died before its end."""
    if job.output is None or job.force or not job.output.is_file():
        return
    with contextlib.suppress(FileNotFoundError):
        if Path(f"{state}-output").read_text() == _identity(job.output, digest):
            return
    reason = "The file already exists. Choose another output, or add --force to replace it"
    raise FileExistsError(errno.EEXIST, reason, str(job.output))


def _identity(path: Path, digest: str) -> str:
    """Return the identity of an output file. A rename keeps it, but any change or replacement of the file does not."""
    stat = os.stat(path)
    return f"{digest} {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"

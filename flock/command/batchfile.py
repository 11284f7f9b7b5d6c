"""A batch from a file to a file, which continues if the same call is repeated.

All rows and their results are stored in the *state*: an SQLite store beside the output, with a batch for each table and
its options. It is kept until ``forget``.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

import anyio
import anyio.to_thread
import msgspec
from msgspec.structs import replace

from flock.agents.handoff import agent_of, columns_of
from flock.agents.questions import nobody
from flock.agents.versions import label_of, recipe_of
from flock.declared import DeclaredFlock
from flock.engine.embedded import EmbeddedEngine
from flock.engine.rowchecks import BatchCheck, check_batch
from flock.formats import is_gzipped
from flock.jsontype import Field
from flock.limits import limits_for_one_batch
from flock.models.models import models_of, names_of
from flock.models.prices import price_of
from flock.rows.dialect import CSVDialect
from flock.rows.files import file_rows
from flock.rows.items import ITEMS_PER_PAGE, item_pages
from flock.rows.likeinput import results_like
from flock.rows.results import results_as
from flock.rows.tables import RowMapping
from flock.runs import DOLLAR, Batch, BatchFilter, BatchOptions, Engine, OnExtra, OnInvalid, Row, Run, RunStatus
from flock.steps.progress import follow_batch, print_progress
from flock.store.batchstate import create_state, remove_state
from flock.store.files import exclusive_lock, remove, sync_folder
from flock.store.store import SQLiteStore

#: How often a process tries to lock the output, in seconds.
LOCK_INTERVAL_S = 0.1
#: The statuses of the rows that ``--partial`` writes.
ENDED = tuple(status for status in RunStatus if status.is_final)


class BatchFile(msgspec.Struct, frozen=True, kw_only=True):
    """The files and options of a batch.

    Attributes:
        output: the file for the results; None is *stdout*.
        format: the format of the output, one of ``FORMATS``.
        force: replace an output that exists.
        state: the file that stores rows and results.
        confirm: asks whether to pay for the rows of a changed agent; raises if declined. By default it does not ask.
        progress: how the progress is shown on stderr.
        retry: which ended rows of an earlier call run again, beside those that were cut off or never ran.
        escape_formulas, with_usage: see ``CSVWriter``.
        files: the folder with the files that rows name. They are read when the rows are.
        like_input: the output is the input with more columns; see ``results_like``.
        expected: outputs by the columns that have their expected values.
        on_extra, input_mapping, static_inputs and others: see ``Flock.run_batch_async``.
    """

    agent_name: str
    rows: Path
    output: Path | None = None
    format: str = "csv"
    state: Path
    options: BatchOptions
    confirm: Callable[[str], None] = lambda question: None
    progress: Literal["bar", "lines", "json", "none"] = "none"
    force: bool = False
    retry: Literal["failed", "cancelled", "all"] = "cancelled"
    on_invalid: OnInvalid = "reject"
    input_mapping: Mapping[str, str | None] = {}
    static_inputs: Mapping[str, msgspec.Raw] = {}
    on_extra: OnExtra = "reject"
    dialect: CSVDialect = CSVDialect()
    escape_formulas: bool = True
    with_usage: bool = False
    like_input: bool = False
    files: Path | None = None
    expected: Mapping[str, Field] = {}

    @property
    def stored_options(self) -> BatchOptions:
        """The options of its batch, which takes the results of equal rows in the state, and their failures."""
        return replace(self.options, reuse=True, reuse_failures=not self.retries_failed)

    @property
    def retries_failed(self) -> bool:
        return self.retry in ("failed", "all")


async def run_batch_file(
    flock: DeclaredFlock,
    job: BatchFile,
    stdout: IO[bytes],
    report: Callable[[str], None],
    read: Callable[[EmbeddedEngine, Batch], Awaitable[None]] | None = None,
) -> tuple[Batch, bool]:
    """Run a batch to its end, and write its results in the order of the rows, also if some have failed.

    Rows that an earlier call with the same rows and options has committed are not run again, unless ``job.retry`` says
    so. The next call continues with its own ``max_cost`` and other limits.

    Args:
        report: receives a message if there are results of an earlier call.
        read: reads the results from the engine when the batch has ended. No output is written.

    Returns: the batch, and whether there was anything to do.

    Raises:
        BlockingIOError: another process is using this state.
        AgentNotFound, InvalidData, TooLarge, DefinitionError: nothing was started; see ``Flock.run_batch_async``.
        StoreError: the state cannot be used, or the file is not a state.
        OSError: a file cannot be read or written, or the output already exists. The state is kept for the next call.

    Cancellation: finished rows are kept for the next call.
    """
    agent_of(flock.agents, job.agent_name)
    state = _real_path(job.state)
    digest = await _digest(flock, job)
    with exclusive_lock(f"{state}-batch"):
        _check_output_free(job, state)
        stored, batch = await _stored_batch(flock, state, digest, job, report)
        is_left = batch is None
        try:
            if batch is None:
                await _check_changed(flock, job, stored)
            limits = limits_for_one_batch(job.options.max_workers)
            async with flock.engine(store=state, limits=limits, expose_errors=True, on_question=nobody) as engine:
                engine.store.contents.source = job.files
                if batch is not None:
                    is_left = await _continue(engine, batch, job, report)
                batch = batch or await _accept(engine, flock, job, digest)
                if job.progress in ("lines", "json"):
                    is_json = job.progress == "json"
                    batch = await print_progress(engine, batch.batch_id, engine.count_submitted, as_json=is_json)
                else:
                    is_shown = job.progress == "bar"
                    batch = await follow_batch(engine, batch.batch_id, engine.count_submitted, is_shown=is_shown)
                pages = item_pages(engine, batch.batch_id)
                await (read(engine, batch) if read else _write(flock, job, batch, pages, stdout))
        except Exception:
            if batch is None and not stored:
                remove_state(state)
            raise
        remove(f"{state}-lock")  # nobody else uses the store while the other lock is held
    return batch, is_left


async def write_partial(flock: DeclaredFlock, job: BatchFile, stdout: IO[bytes]) -> Batch | None:
    """Write the rows that have ended so far, also while another process runs the batch. Nothing is run.

    Returns: the batch; None if the state, a file that exists, has none with these rows and options.

    Raises: as ``run_batch_file``.
    """
    state, digest = _real_path(job.state), await _digest(flock, job)
    _check_output_free(job, state)
    async with SQLiteStore(state) as store:
        stored = [page async for page in _pages_of_batches(flock, store)]
        batch = next((batch for page in stored for batch in page if batch.request_id == digest), None)
        if batch is not None:
            await _write(flock, job, batch, _ended_items(store, batch), stdout)
    return batch


async def _ended_items(store: SQLiteStore, batch: Batch) -> AsyncIterator[Sequence[Run]]:
    after = -1
    while page := await store.batches.items(batch.batch_id, after, ITEMS_PER_PAGE, ENDED):
        yield page
        after = page[-1].position or 0


async def _write(
    flock: DeclaredFlock, job: BatchFile, batch: Batch, pages: AsyncIterator[Sequence[Run]], stdout: IO[bytes]
) -> None:
    names, columns = batch.extra_names, columns_of(job.agent_name, flock.agents)
    options: Any = {"escape_formulas": job.escape_formulas, "with_usage": job.with_usage}
    options["version_of"] = batch.version_of if batch.is_mixed else None
    if job.like_input:
        dialect = replace(job.dialect, delimiter="\t") if job.format == "tsv" else job.dialect
        pieces = results_like(job.rows, dialect, pages, columns[1], **options)
    else:
        pieces = results_as(job.format, pages, names, columns, has_invalid=batch.invalid_items > 0, **options)
    state = _real_path(job.state)
    async with _writing(state) if job.output else contextlib.nullcontext():
        with _output(job, state) if job.output else contextlib.nullcontext(stdout) as file:
            async with contextlib.aclosing(pieces) as written:  # also if the disk is full
                async for piece in written:
                    file.write(piece)
            file.flush()


@contextlib.asynccontextmanager
async def _writing(state: str) -> AsyncIterator[None]:
    """Wait until no other process writes the output, since ``--partial`` may write beside a command.

    The rows are read in this block, so the last writer has the newest.
    """
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(exclusive_lock(f"{state}-write"))
                break
            except BlockingIOError:
                await anyio.sleep(LOCK_INTERVAL_S)
        yield


def forget(path: Path) -> bool:
    """Remove a state. Return whether there was one. Raises StoreError if the file is not a state; BlockingIOError."""
    state = _real_path(path)
    if not os.path.exists(state):
        return False
    with exclusive_lock(f"{state}-batch"):
        create_state(state)
        remove_state(state)
    return True


async def check_batch_file(flock: DeclaredFlock, job: BatchFile) -> BatchCheck:
    """Read and check all rows as ``run_batch_file`` would. Nothing is run or written, and the state is not read.

    Raises: AgentNotFound, TooLarge, OSError; InvalidData if neither a row nor a header can be read.
    """
    row_mapping = _row_mapping(flock, job)
    limits, agent = limits_for_one_batch(1), flock.agents[job.agent_name]
    engine = flock.engine(limits=limits)
    async with contextlib.aclosing(file_rows(job.rows, row_mapping, job.dialect)) as rows:
        # The store has no files yet. If the agent takes no files, no input is read as one.
        engine.store.contents.source, engine.store.contents.is_dry = job.files, True
        files = engine.store.contents.of(None, limits.max_file_bytes, 0) if agent.input.has_files else None
        return await check_batch(engine, agent, files, rows, row_mapping, job.on_invalid)


def _row_mapping(flock: DeclaredFlock, job: BatchFile) -> RowMapping:
    row_mapping = flock.row_mapping(job.agent_name, job.static_inputs, job.input_mapping, job.on_extra)
    row_mapping.expected = job.expected
    return row_mapping


async def _accept(engine: Engine, flock: DeclaredFlock, job: BatchFile, digest: str) -> Batch:
    row_mapping = _row_mapping(flock, job)
    async with contextlib.aclosing(file_rows(job.rows, row_mapping, job.dialect)) as rows:
        return await engine.submit_batch(
            job.agent_name, rows, job.stored_options, on_invalid=job.on_invalid, request_id=digest
        )


async def _digest(flock: DeclaredFlock, job: BatchFile) -> str:
    """Return a hash that is equal for calls that resume each other. It ignores the output and ``max_workers``.

    It is stored as the batch's request id, since idempotency keys are deleted after a day.
    """
    digest = await anyio.to_thread.run_sync(_digest_of, job.rows)
    models = models_of(flock.model, "the flock")
    of_agent = (job.agent_name, flock.agents, models, flock.shared.model_hooks)
    # The results of an agent without a recipe are continued after it was edited, but never scored as those of the new.
    made_by = recipe_of(*of_agent) or (label_of(*of_agent) if job.expected else names_of(models))
    options = (flock.name, made_by, job.agent_name, job.on_invalid, job.on_extra, job.dialect, job.options.timeout_s)
    expected = ((column, field.name) for column, field in job.expected.items())
    fills = (sorted(job.input_mapping.items()), sorted(job.static_inputs.items()), *expected)
    digest.update(msgspec.json.encode((options, fills)))
    if job.files is not None:
        async with contextlib.aclosing(file_rows(job.rows, _row_mapping(flock, job), job.dialect)) as rows:
            async for row in rows:
                for state in _states_of_files(row, job.files):
                    digest.update(state)
    return digest.hexdigest()


def _digest_of(path: Path) -> "hashlib._Hash":
    with _with_filename(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")


def _states_of_files(row: Row, folder: Path) -> Iterator[bytes]:
    """Yield what changes with the files that a row may name: any text in it that is the path of a file."""
    for found in re.finditer(rb'"[^"\\]*(?:\\.[^"\\]*)*"', bytes(row.inputs)):
        with contextlib.suppress(OSError, ValueError):  # it is not a path, or there is no file
            about = os.stat(folder / msgspec.json.decode(found[0], type=str))
            if stat.S_ISREG(about.st_mode):
                yield b"%b %d %d" % (found[0], about.st_size, about.st_mtime_ns)


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


async def _stored_batch(
    flock: DeclaredFlock, state: str, digest: str, job: BatchFile, report: Callable[[str], None]
) -> tuple[list[Batch], Batch | None]:
    """Return the batches in the state, newest first, and the one to continue. No other one will run."""
    create_state(state)
    stored, found = list[Batch](), None
    async with SQLiteStore(state) as store:
        async for page in _pages_of_batches(flock, store):
            stored += page
            for batch in page:
                is_same = batch.request_id == digest and found is None
                found = batch if is_same else found
                # A batch that is cancelled first can be retried as a whole, its failed rows included.
                if not batch.status.is_final and (not is_same or job.retries_failed):
                    await store.batches.request_cancel(batch.batch_id)
        if found is not None:
            await store.batches.set_options(found.batch_id, job.stored_options)
            found = await store.batches.get(found.batch_id)
    if found is None and stored:
        report("The rows or the options have changed, so a new batch starts. The results of earlier ones are kept.")
    return stored, found


async def _pages_of_batches(flock: DeclaredFlock, store: SQLiteStore) -> AsyncIterator[Sequence[Batch]]:
    """Yield the batches of the flock, newest first."""
    after = None
    while page := await store.batches.page(flock.name, BatchFilter(after=after)):
        yield page
        after = page[-1].batch_id


async def _check_changed(flock: DeclaredFlock, job: BatchFile, stored: Sequence[Batch]) -> None:
    """Ask before the rows of an agent are paid of which the state has only results of other definitions."""
    models = models_of(flock.model, "the flock")
    recipe = recipe_of(job.agent_name, flock.agents, models, flock.shared.model_hooks)
    earlier = [batch for batch in stored if batch.agent_name == job.agent_name and batch.recipe is not None]
    if not earlier or any(batch.recipe == recipe for batch in earlier):
        return
    row_mapping = _row_mapping(flock, job)
    async with contextlib.aclosing(file_rows(job.rows, row_mapping, job.dialect)) as rows:
        count = 0
        async for row in rows:
            count += not row.is_empty
    cost = _cost_of(flock, job, earlier[0], count)
    job.confirm(f"The agent {job.agent_name!r} has changed, so all {count:,} rows run again.{cost}")


def _cost_of(flock: DeclaredFlock, job: BatchFile, seen: Batch, count: int) -> str:
    """Return what *count* rows will probably cost: the tokens of the rows of *seen*, at the prices of today's model."""
    ended = seen.completed_items - seen.cancelled_items - seen.invalid_items
    models = models_of(getattr(flock.agents[job.agent_name], "model", None) or flock.model, "the flock")
    price = price_of(flock.prices, models[0].name) if models else None
    if price is None or seen.usage is None or ended <= 0:
        return ""
    cost = price.picodollars(seen.usage)
    cost = price.for_batch(cost) if models[0].batch else cost
    at_prices = f"at the prices of {models[0].name}, if they need as many tokens as the {ended:,} rows before"
    return f" They will cost about ${cost * count / ended / DOLLAR:.2f} {at_prices}."


async def _continue(engine: EmbeddedEngine, batch: Batch, job: BatchFile, report: Callable[[str], None]) -> bool:
    """Start the rows of a stored batch that are left. Return whether there are any."""
    if batch.cancel_requested:
        batch = await engine.wait_batch(batch.batch_id)
    left = {RunStatus.CANCELLED: batch.cancelled_items}
    if job.retries_failed:
        left[RunStatus.FAILED] = batch.failed_items - batch.invalid_items
    is_left = any(left.values()) or not batch.status.is_final
    if is_left:
        done = batch.completed_items - sum(left.values())
        report(f"Resuming: {done:,} of {batch.total_items:,} rows are already done.")
    if is_left and batch.status.is_final:
        statuses = [status for status in left if left[status]]
        await engine.retry_batch(batch.batch_id, statuses, options=job.stored_options)
    return is_left


# The output


@contextlib.contextmanager
def _output(job: BatchFile, state: str) -> Iterator[IO[bytes]]:
    """Yield a file that atomically replaces the output at the end. It is gzip if the output's name says so."""
    assert job.output is not None
    path = Path(_real_path(job.output))
    # The name depends on the state, whose output we have locked. So nobody else uses it, and we find what a crash left.
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
                os.fsync(raw.fileno())
            _check_output_free(job, state)
            ours = [path] if _is_ours(path, state) else []  # it stays if the process dies before the rename
            Path(f"{state}-output").write_text("\n".join(map(_identity, [*ours, part])))
            os.replace(part, path)
            sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _check_output_free(job: BatchFile, state: str) -> None:
    """Raise FileExistsError if the output exists, unless a call with this state wrote it."""
    if job.output is None or job.force or not job.output.is_file() or _is_ours(job.output, state):
        return
    reason = "The file already exists. Choose another output, or add --force to replace it"
    raise FileExistsError(errno.EEXIST, reason, str(job.output))


def _is_ours(output: Path, state: str) -> bool:
    """Return whether a call with this state wrote the file, and it was not changed since."""
    try:
        return _identity(output) in Path(f"{state}-output").read_text().splitlines()
    except FileNotFoundError:
        return False


def _identity(path: Path) -> str:
    """Return the identity of an output file. A rename keeps it, but any change or replacement of the file does not."""
    about = os.stat(path)
    return f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns}"

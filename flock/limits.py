"""The limits of an engine."""

import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from flock.options import Options, option_of, seconds, whole
from flock.runs import QueueLimits


class Limits(Options, frozen=True, kw_only=True):
    """The limits of an engine, its API and its workers. ``docs/limits.md`` describes what happens at each limit.

    ``flock.engine`` accepts each field as a keyword argument, or all of them as ``limits=``. So do
    ``EmbeddedEngine``, ``TemporalEngine`` and ``TemporalWorker``. ``flockapi serve`` and ``flockapi worker`` have an
    option for each field that has a help text.

    Raises: DefinitionError if a limit is invalid.
    """

    TAKEN_BY: ClassVar[str] = "engine"

    #: Max steps running at the same time in one process.
    max_concurrency: Annotated[
        int, whole(1, "Max runs executing at the same time, per process.", on_cluster="worker")
    ] = 100
    #: Max queued runs, over all processes on the store. On a cluster: runs that have not ended, counted twice a second.
    #: A burst of requests may exceed it by the runs that the other API processes accept in that time.
    max_queue: Annotated[int, whole(1, "Max queued runs. Further runs are rejected with 429.")] = 10_000
    #: Max queued runs of one principal; None means half of ``max_queue``.
    max_queue_per_principal: Annotated[
        int | None, whole(1, "Max queued runs of each key. More are rejected with 429.  [default: half of --max-queue]")
    ] = None
    #: Max total size, as JSON, of the inputs of runs that wait for their first step in this process. The inputs are in
    #: memory if the store is, and otherwise on disk. One principal may use half of it. Batch items and runs that are
    #: recovered after a crash do not count.
    max_queue_bytes: Annotated[
        int,
        whole(
            1,
            "Max bytes of the inputs of queued runs, per process. Further runs are rejected with 429.",
            on_cluster="cluster",
        ),
    ] = 256 * 1024 * 1024
    #: Max items in one batch; on a cluster, 16,777,215 at most.
    max_items: Annotated[int, whole(1, "Max items in one batch. Larger batches are rejected with 413.")] = 1_000_000
    #: Max items, over all batches, that have not ended or are still being uploaded.
    max_open_items: Annotated[int, whole(1)] = 10_000_000
    #: Max synchronous functions running at the same time in one process.
    max_threads: Annotated[int, whole(1, on_cluster="worker")] = 40
    #: Max tokens that one run may spend on models, input and output together, as counted by their providers; None means
    #: no limit. It is checked before each model call, so the last answer may exceed it.
    max_tokens: Annotated[
        int | None,
        whole(
            1,
            "Max input and output tokens of one run, checked before each model call.  [default: no limit]",
            on_cluster="worker",
        ),
    ] = None
    #: Max calls of one run; see ``RunContext.call``.
    max_calls: Annotated[int, whole(1, on_cluster="worker")] = 10_000
    #: How long a step waits for its calls, if their tasks swallow their cancellation when the step ends.
    grace_s: Annotated[float, seconds(allow_zero=True, on_cluster="worker")] = 5.0
    #: How long the stored results of a step that runs again wait for a call that it does not make again.
    replay_grace_s: Annotated[float, seconds(allow_zero=True, on_cluster="worker")] = 5.0
    #: Max deaths of its process while a run was running. Then it fails as crashed, if it was the only run in two of
    #: them, including the last.
    max_recoveries: Annotated[
        int, whole(1, "Deaths of its process after which a run fails that was running in them.", on_cluster="worker")
    ] = 3
    #: Max wall-clock seconds of one attempt of a run; also the default for requests without a timeout.
    max_timeout_s: Annotated[float, seconds("Max duration of one attempt of a run.")] = 86_400
    #: Max size of the inputs of one run, as JSON. A cluster without a ``payload_dir`` accepts at most a million bytes.
    max_input_bytes: Annotated[int, whole(1)] = 16 * 1024 * 1024
    #: Max size of one file in the inputs of a run.
    max_file_bytes: Annotated[int, whole(1)] = 64 * 1024 * 1024
    #: Max size of all files of one principal together. The same content counts once.
    max_files_bytes: Annotated[int, whole(1)] = 10 * 1024**3
    #: Max size of the result of one step, as JSON; a longer result fails the run. For a cluster, see
    #: ``TemporalWorker``.
    max_result_bytes: Annotated[int, whole(1, on_cluster="cluster")] = 16 * 1024 * 1024
    #: Max seconds that a run may wait for its first step; None means no limit. Batch items are exempt.
    queue_timeout_s: Annotated[
        float | None, seconds("Max time that a run may wait for its first step.  [default: no limit]", allow_zero=True)
    ] = None
    #: Delete runs this many seconds after they end; None keeps them. A batch counts as one run.
    keep_for_s: Annotated[
        float | None,
        seconds("Delete runs this long after they end.  [default: keep them]", allow_zero=True, on_cluster="namespace"),
    ] = None
    #: Keep this many ended runs, the newest, and delete the others; None keeps all. A batch counts as one run.
    keep_runs: Annotated[
        int | None,
        whole(1, "Number of ended runs to keep. Older ones are deleted.  [default: keep all]", on_cluster="namespace"),
    ] = None

    @property
    def queue(self) -> QueueLimits:
        return QueueLimits.of(self.max_queue, self.max_queue_per_principal)


def enforced_by(component: str) -> Sequence[str]:
    """Return the limits that *component* enforces if runs are stored on a Temporal cluster; see ``Option``."""
    options = {field.name: option_of(field) for field in msgspec.structs.fields(Limits)}
    return [name for name, option in options.items() if option is not None and option.on_cluster == component]


def limits_for_one_batch(max_workers: int) -> Limits:
    """Return the limits of an engine that executes one batch of the program itself. Only its workers are limited."""
    max_workers = max(1, max_workers)  # ``submit_batch`` reports the error if it is less
    slots = max_workers + max_workers // 5 + 1  # a tenth of the slots is reserved for runs that are not items
    return Limits(
        max_concurrency=slots,
        max_threads=slots,
        max_items=sys.maxsize,
        max_open_items=sys.maxsize,
        max_files_bytes=sys.maxsize,
    )

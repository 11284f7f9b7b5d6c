"""The bounds of an engine."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from flock.options import Options, option_of, seconds, whole
from flock.runs import QueueLimits

__all__ = ["Limits", "enforced_by"]


class Limits(Options, frozen=True, kw_only=True):
    """The bounds of an engine, of its API and of its workers; ``docs/limits.md`` says what happens beyond each.

    ``flock.engine`` takes each field as a keyword argument, or all of them as ``limits=``. So do ``EmbeddedEngine``,
    ``TemporalEngine`` and ``TemporalWorker``. ``flockapi serve`` and ``flockapi worker`` have an option for each field
    with a help text.

    Raises: DefinitionError if a bound is not valid.
    """

    TAKEN_BY: ClassVar[str] = "engine"

    #: Steps at work at the same time, in one process.
    max_concurrency: Annotated[
        int, whole(1, "Runs at work at the same time, in each process.", on_cluster="worker")
    ] = 100
    #: Runs accepted and waiting, in all processes on the store. On a cluster: runs that have not ended, counted twice a
    #: second, so that many requests at once may exceed it by what the other API processes accept in that time.
    max_queue: Annotated[int, whole(1, "Runs accepted and waiting; more are refused with 429.")] = 10_000
    #: Those of them that belong to one principal; None is half of them.
    max_queue_per_principal: Annotated[
        int | None, whole(1, "Those of them that belong to one key or caller.  [default: half of --max-queue]")
    ] = None
    #: Inputs, as JSON, of all runs that wait for their first step in this process. They are in memory if the store is,
    #: and otherwise on disk. One principal may have half of it. Neither items of batches count nor runs that were taken
    #: over after a crash.
    max_queue_bytes: Annotated[
        int, whole(1, "Inputs of waiting runs in each process; more are refused with 429.", on_cluster="cluster")
    ] = 256 * 1024 * 1024
    #: Items of one batch; on a cluster 16,777,215 at most.
    max_items: Annotated[int, whole(1, "Items of one batch; more are refused with 413.")] = 1_000_000
    #: Items of all batches together that have not ended, or are still being uploaded.
    max_open_items: Annotated[int, whole(1)] = 10_000_000
    #: Synchronous functions at work at the same time, in one process.
    max_threads: Annotated[int, whole(1, on_cluster="worker")] = 40
    #: Tokens that one run may spend on models, input and output together, as their providers count them; None is no
    #: limit. It is checked before each call, so the last answer may exceed it.
    max_tokens: Annotated[
        int | None,
        whole(
            1,
            "Tokens that a run may spend before it asks its model once more, input and output.  [default: no limit]",
            on_cluster="worker",
        ),
    ] = None
    #: Wall-clock seconds of one attempt of a run; also what it may take if its request names no time.
    max_timeout_s: Annotated[float, seconds("The longest that one attempt of a run may take.")] = 86_400
    #: The longest inputs of one run, as JSON. Without a ``payload_dir``, a cluster takes a million at most.
    max_input_bytes: Annotated[int, whole(1)] = 16 * 1024 * 1024
    #: The longest result of one step, as JSON; a longer one fails its run. For a cluster, see ``TemporalWorker``.
    max_result_bytes: Annotated[int, whole(1, on_cluster="cluster")] = 16 * 1024 * 1024
    #: Seconds that a run may wait for its first step, unless it is an item of a batch; None is no limit.
    queue_timeout_s: Annotated[
        float | None, seconds("The longest that a run may wait for its first step.  [default: no limit]", may_be_0=True)
    ] = None
    #: Runs that ended longer ago are deleted, in seconds; None keeps them. A batch counts as one.
    keep_for_s: Annotated[
        float | None,
        seconds("Delete runs that ended longer ago.  [default: keep them]", may_be_0=True, on_cluster="namespace"),
    ] = None
    #: Ended runs beyond the newest so many are deleted; None keeps them. A batch counts as one.
    keep_runs: Annotated[
        int | None,
        whole(1, "Delete ended runs beyond the newest so many.  [default: keep them]", on_cluster="namespace"),
    ] = None

    @property
    def queue(self) -> QueueLimits:
        return QueueLimits.of(self.max_queue, self.max_queue_per_principal)


def enforced_by(who: str) -> Sequence[str]:
    """The bounds that *who* enforces if the runs are kept on a Temporal cluster; see ``Option.on_cluster``."""
    options = {field.name: option_of(field) for field in msgspec.structs.fields(Limits)}
    return [name for name, option in options.items() if option is not None and option.on_cluster == who]

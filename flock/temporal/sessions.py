"""Sessions on a cluster: how a run joins one, and the runs before it.

Runs of a session wait in a workflow of their own, ``flock_session``. It has the order in which they joined, and lets
the first of them begin.
"""

import contextlib
from collections.abc import AsyncGenerator, Sequence

from temporalio.common import WorkflowIDConflictPolicy

from flock.runs import Run, RunStatus
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    TASK_TIMEOUT,
    run_workflow_id,
    session_workflow_id,
    task_queue_of,
)
from flock.temporal.records import run_of
from flock.temporal.reservations import Reservations
from flock.temporal.search import earlier_turns
from flock.temporal.workflows import FlockSession

__all__ = ["earlier_runs", "join_session"]


async def join_session(cluster: Cluster, run: Run) -> None:
    """Append an attempt of *run* to its session. No effect if it is in there. Raises StoreError, EngineFull."""
    async with cluster.rpc_scope():
        await cluster.client.start_workflow(
            FlockSession.run,
            args=[[], []],
            id=session_workflow_id(run),
            task_queue=task_queue_of(run.flock),
            task_timeout=TASK_TIMEOUT,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal="join",
            start_signal_args=[run_workflow_id(run.run_id, run.attempt)],
        )


async def earlier_runs(cluster: Cluster, run: Run, latest: Sequence[str], limit: int, max_bytes: int) -> Sequence[Run]:
    """Return completed runs of the session and the agent of *run*; see ``ActiveRun.earlier_runs``.

    Args:
        latest: the workflow ids of the last runs of the session, since the search of the cluster may lag.

    Raises: StoreError, EngineFull.
    """
    reservations = Reservations(cluster, run.flock, task_queue_of(run.flock))
    found: list[Run] = []
    async with contextlib.aclosing(_workflow_ids(cluster, run, latest)) as workflow_ids:
        async for workflow_id in workflow_ids:
            earlier = await _completed(cluster, workflow_id)
            if earlier is None or earlier.agent_name != run.agent_name or await reservations.is_deleted(earlier.run_id):
                continue
            max_bytes -= earlier.turn_bytes
            if max_bytes < 0:
                break
            found.append(earlier)
            if len(found) == limit:
                break
    return sorted(found, key=lambda run: run.run_id)


async def _workflow_ids(cluster: Cluster, run: Run, latest: Sequence[str]) -> AsyncGenerator[str, None]:
    """Yield the workflow ids of *latest*, and of the completed runs that the search finds, last first."""
    for workflow_id in reversed(latest):
        yield workflow_id
    async with cluster.rpc_scope(None):
        async for workflow in cluster.client.list_workflows(earlier_turns(run), page_size=100):
            if workflow.id not in latest:
                yield workflow.id


async def _completed(cluster: Cluster, workflow_id: str) -> Run | None:
    async with cluster.rpc_scope(missing_ok=True):  # it may have been deleted
        run = run_of(await cluster.history_of(workflow_id))
        return run if run.status is RunStatus.COMPLETED else None
    return None
